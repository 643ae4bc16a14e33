"""Qwen-Image."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig
from piflow.config.section import Positive


class QwenImageEncoderConfig(TextEncoderConfig):
    """Qwen-Image's text encoder: Qwen2.5-VL under the family's template."""

    module = "piflow.backbones.qwen_image.text"
    tiny = "piflow.backbones.qwen_image.tiny"

    type: Literal["qwen_image"] = "qwen_image"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens after the template's, at most 1024."""


FAMILY = Family(
    backbone="piflow.backbones.qwen_image.backbone:QwenImageBackbone",
    encoders=(QwenImageEncoderConfig, BertEncoderConfig),
    vaes=("AutoencoderKLQwenImage",),
    masks_text=True,
    splits_tokens=True,
    tiny="piflow.backbones.qwen_image.tiny",
    pipeline="piflow.inference.qwen_image:PiQwenImagePipeline",
    lora_files="diffusers.loaders.lora_pipeline:QwenImageLoraLoaderMixin",
    published=Published("Qwen-Image", repository="Qwen/Qwen-Image"),
)
