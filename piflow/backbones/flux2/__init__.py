"""FLUX.2."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig
from piflow.config.section import Positive


class Flux2EncoderConfig(TextEncoderConfig):
    """FLUX.2's text encoder: Mistral 3 after the family's system message, three layers' states."""

    module = "piflow.backbones.flux2.text"
    tiny = "piflow.backbones.flux2.tiny"

    type: Literal["flux2"] = "flux2"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens, with the system message's, that a prompt is padded or cut to."""

    @property
    def keeps_padding(self) -> bool:
        """Always: the model has no mask."""
        return True


FAMILY = Family(
    backbone="piflow.backbones.flux2.backbone:Flux2Backbone",
    encoders=(Flux2EncoderConfig, BertEncoderConfig),
    vaes=("AutoencoderKLFlux2",),
    splits_tokens=True,
    tiny="piflow.backbones.flux2.tiny",
    pipeline="piflow.inference.flux2:PiFlux2Pipeline",
    lora_files="diffusers.loaders.lora_pipeline:Flux2LoraLoaderMixin",
    published=Published(
        "FLUX.2-dev", repository="black-forest-labs/FLUX.2-dev", embedded_guidance=4.0
    ),
)
