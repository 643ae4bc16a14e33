"""Qwen-Image."""

from piflow.config import BertEncoderConfig, Family, QwenImageEncoderConfig

FAMILY = Family(
    backbone="piflow.backbones.qwen_image.backbone:QwenImageBackbone",
    encoders=(QwenImageEncoderConfig, BertEncoderConfig),
    vaes=("AutoencoderKLQwenImage",),
    splits_tokens=True,
    tiny="piflow.backbones.qwen_image.tiny",
    pipeline="piflow.inference.qwen_image:PiQwenImagePipeline",
)
