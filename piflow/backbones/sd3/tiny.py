"""A tiny random Stable Diffusion 3, with two CLIPs and T5."""

from __future__ import annotations

from typing import Any

from piflow.backbones import tiny
from piflow.backbones.sd3 import SD3EncoderConfig
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`SD3Transformer2DModel`."""
    from diffusers import SD3Transformer2DModel

    text_width = 2 * tiny.TEXT_WIDTH  # two CLIP models side by side
    return SD3Transformer2DModel(
        sample_size=size // 2,
        in_channels=tiny.channels(model),
        out_channels=tiny.channels(model),
        num_layers=3,
        joint_attention_dim=text_width,
        caption_projection_dim=tiny.HEADS["num_attention_heads"] * tiny.HEADS["attention_head_dim"],
        pooled_projection_dim=text_width,
        pos_embed_max_size=size,
        qk_norm="rms_norm",
        **tiny.HEADS,
    )


def vae(size: int) -> Any:
    """`AutoencoderKL`."""
    return tiny.kl_vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`StableDiffusion3Pipeline`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(scheduler=scheduler, **parts)


def text_parts(encoder: SD3EncoderConfig) -> list[tuple[str, Any]]:
    """Two CLIP models and T5, which is as wide as both."""
    clip, t5 = tiny.clip_tokenizer(), tiny.t5_tokenizer()
    return [
        ("text_encoder", _clip_with_projection(clip)),
        ("tokenizer", clip),
        ("text_encoder_2", _clip_with_projection(clip)),
        ("tokenizer_2", clip),
        ("text_encoder_3", tiny.t5_model(len(t5), 2 * tiny.TEXT_WIDTH)),
        ("tokenizer_3", t5),
    ]


def _clip_with_projection(tokenizer: Any) -> Any:
    """A model of two layers: Stable Diffusion 3 takes the states of the last but one."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(tiny.clip_config(tokenizer, layers=2))
