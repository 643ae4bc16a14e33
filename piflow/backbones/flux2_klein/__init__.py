"""FLUX.2-klein: FLUX.2's architecture in smaller sizes, with Qwen3 for its text."""

from __future__ import annotations

from typing import Literal

from piflow.config import BertEncoderConfig, Family, Published, TextEncoderConfig
from piflow.config.section import Positive


class Flux2KleinEncoderConfig(TextEncoderConfig):
    """FLUX.2-klein's text encoder: Qwen3, three layers' states of a turn of a chat."""

    module = "piflow.backbones.flux2_klein.text"
    tiny = "piflow.backbones.flux2_klein.tiny"

    type: Literal["flux2_klein"] = "flux2_klein"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens, with the chat template's, that a prompt is padded or cut to."""

    @property
    def keeps_padding(self) -> bool:
        """Always: the model has no mask."""
        return True


FAMILY = Family(
    backbone="piflow.backbones.flux2.backbone:Flux2Backbone",
    encoders=(Flux2KleinEncoderConfig, BertEncoderConfig),
    vaes=("AutoencoderKLFlux2",),
    splits_tokens=True,
    tiny="piflow.backbones.flux2_klein.tiny",
    pipeline="piflow.inference.flux2_klein:PiFlux2KleinPipeline",
    lora_files="diffusers.loaders.lora_pipeline:Flux2LoraLoaderMixin",
    published=Published(
        "FLUX.2-klein-base-4B",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        repository="black-forest-labs/FLUX.2-klein-base-4B",
    ),
    others=(
        Published(
            "FLUX.2-klein-base-9B",
            {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
            repository="black-forest-labs/FLUX.2-klein-base-9B",
        ),
    ),
)
