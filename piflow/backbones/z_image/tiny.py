"""A tiny random Z-Image, with Qwen3."""

from __future__ import annotations

from typing import Any

from piflow.backbones import qwen3_tiny, tiny
from piflow.backbones.z_image import ZImageEncoderConfig
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`ZImageTransformer2DModel`."""
    from diffusers import ZImageTransformer2DModel

    heads, width = tiny.HEADS["num_attention_heads"], tiny.HEADS["attention_head_dim"]
    return ZImageTransformer2DModel(
        in_channels=tiny.channels(model),
        dim=heads * width,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=tiny.TEXT_WIDTH,
        axes_dims=list(tiny.AXES),
        axes_lens=[256, 64, 64],
    )


def vae(size: int) -> Any:
    """`AutoencoderKL`."""
    return tiny.kl_vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`ZImagePipeline`."""
    from diffusers import ZImagePipeline

    return ZImagePipeline(scheduler=tiny.flow_scheduler(), **parts)


def text_parts(encoder: ZImageEncoderConfig) -> list[tuple[str, Any]]:
    """Qwen3 and its tokenizer."""
    return qwen3_tiny.text_parts(layers=2)
