"""Backbones by family, the codecs of their latents and the encoders of their prompts.

A family is a folder here: its record is the folder's `FAMILY`, which is light, as this file is; all
else is imported when it is first used, and brings torch and a good part of diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piflow.backbones.base import Backbone, Conditioning, OutputLayer
    from piflow.backbones.codec import Codec, PixelCodec, VAECodec, build_codec
    from piflow.backbones.dit.backbone import DiTBackbone
    from piflow.backbones.flux.backbone import FluxBackbone
    from piflow.backbones.flux2.backbone import Flux2Backbone
    from piflow.backbones.flux_kontext.backbone import FluxKontextBackbone
    from piflow.backbones.load import DTYPES, family_class, load_backbone, load_empty_backbone
    from piflow.backbones.qwen_image.backbone import QwenImageBackbone
    from piflow.backbones.qwen_image_edit.backbone import QwenImageEditBackbone
    from piflow.backbones.sd3.backbone import SD3Backbone
    from piflow.backbones.wan.backbone import WanBackbone
    from piflow.backbones.z_image.backbone import ZImageBackbone

__all__ = [
    "DTYPES",
    "Backbone",
    "Codec",
    "Conditioning",
    "DiTBackbone",
    "Flux2Backbone",
    "FluxBackbone",
    "FluxKontextBackbone",
    "OutputLayer",
    "PixelCodec",
    "QwenImageBackbone",
    "QwenImageEditBackbone",
    "SD3Backbone",
    "VAECodec",
    "WanBackbone",
    "ZImageBackbone",
    "build_codec",
    "family_class",
    "load_backbone",
    "load_empty_backbone",
]

_HOMES = {  # module here -> the names of this package that it holds
    "base": ("Backbone", "Conditioning", "OutputLayer"),
    "codec": ("Codec", "PixelCodec", "VAECodec", "build_codec"),
    "dit.backbone": ("DiTBackbone",),
    "flux.backbone": ("FluxBackbone",),
    "flux2.backbone": ("Flux2Backbone",),
    "flux_kontext.backbone": ("FluxKontextBackbone",),
    "load": ("DTYPES", "family_class", "load_backbone", "load_empty_backbone"),
    "qwen_image.backbone": ("QwenImageBackbone",),
    "qwen_image_edit.backbone": ("QwenImageEditBackbone",),
    "sd3.backbone": ("SD3Backbone",),
    "wan.backbone": ("WanBackbone",),
    "z_image.backbone": ("ZImageBackbone",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
