"""FLUX.1."""

from piflow.config import BertEncoderConfig, Family, FluxEncoderConfig

FAMILY = Family(
    backbone="piflow.backbones.flux.backbone:FluxBackbone",
    encoders=(FluxEncoderConfig, BertEncoderConfig),
    splits_tokens=True,
    tiny="piflow.backbones.flux.tiny",
    pipeline="piflow.inference.flux:PiFluxPipeline",
)
