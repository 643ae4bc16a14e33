"""Backbones by family, and codecs by name."""

from __future__ import annotations

import torch

from piflow.backbones.base import Backbone, Conditioning
from piflow.backbones.codec import PixelCodec
from piflow.backbones.flux import FluxBackbone
from piflow.config import ModelConfig

__all__ = ["Backbone", "Conditioning", "FluxBackbone", "PixelCodec", "build_codec", "load_backbone"]

FAMILIES = {"flux": FluxBackbone}
CODECS = {"pixels": PixelCodec}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_backbone(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    embedded_guidance: float | None = None,
) -> FluxBackbone:
    """The recipe's transformer as it is on disk: the teacher, with no adapters.

    Raises:
        ValueError: a folder that isn't this family's model, or guidance that doesn't fit it.
    """
    return FAMILIES[model.family].load(
        model.path,
        dtype=DTYPES[model.dtype],
        device=device,
        embedded_guidance=embedded_guidance,
    )


def build_codec(model: ModelConfig) -> PixelCodec:
    """The recipe's codec between pictures and latents."""
    return CODECS[model.codec]()
