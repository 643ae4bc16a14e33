"""A tiny random FLUX.1, with CLIP and T5."""

from __future__ import annotations

from typing import Any

from piflow.backbones import tiny
from piflow.backbones.flux import FluxEncoderConfig
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`FluxTransformer2DModel`."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * tiny.channels(model),
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=tiny.TEXT_WIDTH,
        pooled_projection_dim=tiny.TEXT_WIDTH,
        axes_dims_rope=tiny.AXES,
        guidance_embeds=guidance_embeds,
        **tiny.HEADS,
    )


def vae(size: int) -> Any:
    """`AutoencoderKL`."""
    return tiny.kl_vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`FluxPipeline`."""
    from diffusers import FluxPipeline

    return FluxPipeline(scheduler=tiny.flow_scheduler(), **parts)


def text_parts(encoder: FluxEncoderConfig) -> list[tuple[str, Any]]:
    """CLIP and T5."""
    clip, t5 = tiny.clip_tokenizer(), tiny.t5_tokenizer()
    return [
        ("text_encoder", _clip_model(clip)),
        ("tokenizer", clip),
        ("text_encoder_2", tiny.t5_model(len(t5))),
        ("tokenizer_2", t5),
    ]


def _clip_model(tokenizer: Any) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(tiny.clip_config(tokenizer, layers=1))
