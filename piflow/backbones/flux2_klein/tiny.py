"""A tiny random FLUX.2-klein, with Qwen3."""

from __future__ import annotations

from typing import Any

from piflow.backbones import qwen3_tiny
from piflow.backbones.flux2 import tiny as flux2
from piflow.backbones.flux2_klein import Flux2KleinEncoderConfig
from piflow.backbones.flux2_klein.text import LAYERS
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`Flux2Transformer2DModel`, which takes no embedded guidance here."""
    return flux2.transformer(model, encoder, size, guidance_embeds=False)


def vae(size: int) -> Any:
    """`AutoencoderKLFlux2`."""
    return flux2.vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`Flux2KleinPipeline`."""
    from diffusers import Flux2KleinPipeline

    from piflow.backbones.tiny import flow_scheduler

    return Flux2KleinPipeline(scheduler=flow_scheduler(), **parts)


def text_parts(encoder: Flux2KleinEncoderConfig) -> list[tuple[str, Any]]:
    """Qwen3, with one layer more than the family asks, and its tokenizer."""
    return qwen3_tiny.text_parts(layers=LAYERS[-1] + 1)
