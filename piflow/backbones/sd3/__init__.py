"""Stable Diffusion 3 and 3.5."""

from piflow.config import BertEncoderConfig, Family, SD3EncoderConfig

FAMILY = Family(
    backbone="piflow.backbones.sd3.backbone:SD3Backbone",
    encoders=(SD3EncoderConfig, BertEncoderConfig),
    packs_latents=False,  # the model cuts its patches itself
    tiny="piflow.backbones.sd3.tiny",
    pipeline="piflow.inference.sd3:PiSD3Pipeline",
)
