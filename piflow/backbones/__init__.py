"""Backbones by family, and codecs by name.

A family's module is imported when the family is first used: each pulls in a good part of
diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from piflow.backbones.base import Backbone, Conditioning, OutputLayer
from piflow.backbones.codec import Codec, PixelCodec, VAECodec, build_codec
from piflow.config import ModelConfig
from piflow.sharding.weights import StoredTensor

if TYPE_CHECKING:
    from piflow.backbones.dit.backbone import DiTBackbone
    from piflow.backbones.flux.backbone import FluxBackbone
    from piflow.backbones.flux2.backbone import Flux2Backbone
    from piflow.backbones.qwen_image.backbone import QwenImageBackbone
    from piflow.backbones.sd3.backbone import SD3Backbone

__all__ = [
    "Backbone",
    "Codec",
    "Conditioning",
    "DiTBackbone",
    "Flux2Backbone",
    "FluxBackbone",
    "OutputLayer",
    "PixelCodec",
    "QwenImageBackbone",
    "SD3Backbone",
    "VAECodec",
    "build_codec",
    "family_class",
    "load_backbone",
    "load_empty_backbone",
]

FAMILIES = {  # name -> class, in the module of the name
    "flux": "FluxBackbone",
    "flux2": "Flux2Backbone",
    "qwen_image": "QwenImageBackbone",
    "sd3": "SD3Backbone",
    "dit": "DiTBackbone",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def family_class(family: str) -> type[Backbone]:
    """The backbone class of `model.family`."""
    module = importlib.import_module(f"piflow.backbones.{family}.backbone")
    backbone_class: type[Backbone] = getattr(module, FAMILIES[family])
    return backbone_class


def __getattr__(name: str) -> Any:
    """The families' classes, as names of this package."""
    for family, class_name in FAMILIES.items():
        if name == class_name:
            return family_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    return family_class(model.family).load(
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
    return family_class(model.family).load_empty(
        model.path, dtype=DTYPES[model.dtype], embedded_guidance=embedded_guidance
    )
