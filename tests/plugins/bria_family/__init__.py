"""Bria's family of models for piflow: `model.family: bria_family`."""

from typing import Literal

from piflow.config import Family, TextEncoderConfig
from piflow.config.section import Positive


class BriaEncoderConfig(TextEncoderConfig):
    """T5's states of a prompt's own tokens."""

    module = "bria_family.text"
    tiny = "bria_family.tiny"

    type: Literal["bria"] = "bria"
    max_tokens: Positive = 128
    """Tokens a prompt is padded or truncated to."""


FAMILY = Family(
    backbone="bria_family.backbone:BriaBackbone",
    encoders=(BriaEncoderConfig,),
    tiny="bria_family.tiny",
    pipeline="bria_family.pipeline:PiBriaPipeline",
    defaults={"guidance": {"scale": 5.0}},  # BriaPipeline's own
)
