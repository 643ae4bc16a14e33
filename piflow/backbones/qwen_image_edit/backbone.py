"""Qwen-Image-Edit's architecture, of any size: Qwen-Image's transformer with a picture to edit."""

from __future__ import annotations

from piflow.backbones.qwen_image.backbone import QwenImageBackbone


class QwenImageEditBackbone(QwenImageBackbone):
    """A `QwenImageTransformer2DModel` that is shown a picture beside the noisy latents.

    The picture's tokens come after the noisy ones, at the positions of a second picture; what the
    model says of them is left out.

    Args and errors as `QwenImageBackbone`.
    """

    takes_condition = True
