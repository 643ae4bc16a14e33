"""Wan 2.1, which makes videos."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig, Video
from piflow.config.section import Positive


class WanEncoderConfig(TextEncoderConfig):
    """Wan's text encoder: UMT5, the states of the prompt's own tokens."""

    module = "piflow.backbones.wan.text"
    tiny = "piflow.backbones.wan.tiny"

    type: Literal["wan"] = "wan"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens that a prompt is cut to; the model sees zeros up to this number."""


FAMILY = Family(
    backbone="piflow.backbones.wan.backbone:WanBackbone",
    encoders=(WanEncoderConfig, BertEncoderConfig),
    vaes=("AutoencoderKLWan",),
    packs_latents=False,  # the model cuts its patches itself
    video=Video(frames=81, step=4, rate=16),
    tiny="piflow.backbones.wan.tiny",
    pipeline="piflow.inference.wan:PiWanPipeline",
    lora_files="diffusers.loaders.lora_pipeline:WanLoraLoaderMixin",
    published=Published(
        "Wan 2.1 T2V 1.3B",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        size=480,
    ),
    others=(Published("Wan 2.1 T2V 14B", repository="Wan-AI/Wan2.1-T2V-14B-Diffusers", size=720),),
)
