"""FLUX.1-Kontext's architecture, of any size: FLUX.1's transformer with a picture to edit."""

from __future__ import annotations

from piflow.backbones.flux.backbone import FluxBackbone


class FluxKontextBackbone(FluxBackbone):
    """A `FluxTransformer2DModel` that is shown a picture beside the noisy latents.

    The picture's tokens come after the noisy ones, at positions whose first coordinate is 1; what
    the model says of them is left out.

    Args and errors as `FluxBackbone`.
    """

    takes_condition = True
