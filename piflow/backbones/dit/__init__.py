"""Class-conditional DiT."""

from piflow.config import ClassLabelEncoderConfig, Family

FAMILY = Family(
    backbone="piflow.backbones.dit.backbone:DiTBackbone",
    encoders=(ClassLabelEncoderConfig,),
    packs_latents=False,  # the model cuts its patches itself
    tiny="piflow.backbones.dit.tiny",
    pipeline="piflow.inference.dit:PiDiTPipeline",
)
