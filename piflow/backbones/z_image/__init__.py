"""Z-Image."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig
from piflow.config.section import Positive


class ZImageEncoderConfig(TextEncoderConfig):
    """Z-Image's text encoder: Qwen3, the states before its last layer of a turn of a chat."""

    module = "piflow.backbones.z_image.text"
    tiny = "piflow.backbones.z_image.tiny"

    type: Literal["z_image"] = "z_image"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens, with the chat template's, that a prompt is cut to."""


FAMILY = Family(
    backbone="piflow.backbones.z_image.backbone:ZImageBackbone",
    encoders=(ZImageEncoderConfig, BertEncoderConfig),
    packs_latents=False,  # the model cuts its patches itself
    masks_text=True,
    unguided_scale=0.0,
    tiny="piflow.backbones.z_image.tiny",
    pipeline="piflow.inference.z_image:PiZImagePipeline",
    lora_files="diffusers.loaders.lora_pipeline:ZImageLoraLoaderMixin",
    published=Published(
        "Z-Image", {"axes_lens": [1536, 512, 512]}, repository="Tongyi-MAI/Z-Image"
    ),
)
