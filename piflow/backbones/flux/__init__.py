"""FLUX.1."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig
from piflow.config.section import Positive


class FluxEncoderConfig(TextEncoderConfig):
    """FLUX.1's two text encoders: T5 for token states, CLIP for the pooled vector."""

    module = "piflow.backbones.flux.text"
    tiny = "piflow.backbones.flux.tiny"

    type: Literal["flux"] = "flux"
    path: str
    """URI of a folder with text_encoder(_2) and tokenizer(_2)."""

    max_tokens: Positive = 512
    """T5 tokens a prompt is padded or truncated to."""

    padding: Literal["keep", "drop"] = "keep"
    """keep: all max_tokens states, as FluxPipeline feeds; drop: only the prompt's, zeros elsewhere
    (10-40 times smaller store, another conditioning than the pipeline's).
    """

    @property
    def keeps_padding(self) -> bool:
        """Whether `padding` says so."""
        return self.padding == "keep"


FAMILY = Family(
    backbone="piflow.backbones.flux.backbone:FluxBackbone",
    encoders=(FluxEncoderConfig, BertEncoderConfig),
    splits_tokens=True,
    tiny="piflow.backbones.flux.tiny",
    pipeline="piflow.inference.flux:PiFluxPipeline",
    lora_files="diffusers.loaders.lora_pipeline:FluxLoraLoaderMixin",
    published=Published(
        "FLUX.1-dev",
        {"guidance_embeds": True},
        repository="black-forest-labs/FLUX.1-dev",
        embedded_guidance=3.5,
    ),
)
