"""Backbones by family, and codecs by name."""

from __future__ import annotations

import torch
from torch import nn

from piflow.backbones.base import Backbone, Conditioning, OutputLayer
from piflow.backbones.codec import Codec, PixelCodec, VAECodec, build_codec
from piflow.backbones.dit import DiTBackbone
from piflow.backbones.flux import FluxBackbone
from piflow.backbones.qwen_image import QwenImageBackbone
from piflow.config import ModelConfig
from piflow.weights import StoredTensor

__all__ = [
    "Backbone",
    "Codec",
    "Conditioning",
    "DiTBackbone",
    "FluxBackbone",
    "OutputLayer",
    "PixelCodec",
    "QwenImageBackbone",
    "VAECodec",
    "build_codec",
    "load_backbone",
    "load_empty_backbone",
]

FAMILIES: dict[str, type[Backbone]] = {
    "flux": FluxBackbone,
    "qwen_image": QwenImageBackbone,
    "dit": DiTBackbone,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_backbone(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    embedded_guidance: float | None = None,
) -> Backbone:
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


def load_empty_backbone(
    model: ModelConfig, *, embedded_guidance: float | None = None
) -> tuple[Backbone, dict[nn.Parameter, StoredTensor]]:
    """`load_backbone`, less the weights: parameters on "meta", and where their values lie.

    Raises:
        ValueError: as `load_backbone`.
    """
    return FAMILIES[model.family].load_empty(
        model.path, dtype=DTYPES[model.dtype], embedded_guidance=embedded_guidance
    )
