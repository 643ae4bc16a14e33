"""A tiny random FLUX.1-Kontext: FLUX.1's, in Kontext's pipeline."""

from __future__ import annotations

from typing import Any

from piflow.backbones import tiny
from piflow.backbones.flux import tiny as flux
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`FluxTransformer2DModel`."""
    return flux.transformer(model, encoder, size, guidance_embeds)


def vae(size: int) -> Any:
    """`AutoencoderKL`."""
    return flux.vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`FluxKontextPipeline`."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(scheduler=tiny.flow_scheduler(), **parts)
