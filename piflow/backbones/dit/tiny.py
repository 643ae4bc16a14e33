"""A tiny random DiT."""

from __future__ import annotations

from typing import Any

from piflow.backbones import tiny
from piflow.backbones.dit import ClassLabelEncoderConfig
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`DiTTransformer2DModel`, with as many classes as the encoder says."""
    from diffusers import DiTTransformer2DModel

    assert isinstance(encoder, ClassLabelEncoderConfig)  # the one kind that the family takes
    return DiTTransformer2DModel(
        in_channels=tiny.channels(model),
        out_channels=tiny.channels(model),
        num_layers=2,
        sample_size=size // 2,
        num_embeds_ada_norm=encoder.num_classes,
        norm_num_groups=2,
        **tiny.HEADS,
    )


def vae(size: int) -> Any:
    """`AutoencoderKL`."""
    return tiny.kl_vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`DiTPipeline`."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(scheduler=DDIMScheduler(), **parts)


def text_parts(encoder: ClassLabelEncoderConfig) -> list[tuple[str, Any]]:
    """None."""
    return []
