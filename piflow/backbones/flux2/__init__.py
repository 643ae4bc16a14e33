"""FLUX.2."""

from piflow.config import BertEncoderConfig, Family, Flux2EncoderConfig

FAMILY = Family(
    backbone="piflow.backbones.flux2.backbone:Flux2Backbone",
    encoders=(Flux2EncoderConfig, BertEncoderConfig),
    vaes=("AutoencoderKLFlux2",),
    splits_tokens=True,
    tiny="piflow.backbones.flux2.tiny",
    pipeline="piflow.inference.flux2:PiFlux2Pipeline",
)
