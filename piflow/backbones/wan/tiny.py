"""A tiny random Wan, with UMT5 and a VAE that makes a quarter of a video's sides and frames."""

from __future__ import annotations

from typing import Any

from piflow.backbones import tiny
from piflow.backbones.wan import WanEncoderConfig
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`WanTransformer3DModel`."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=tiny.channels(model),
        out_channels=tiny.channels(model),
        num_layers=2,
        ffn_dim=2 * tiny.TEXT_WIDTH,
        text_dim=tiny.TEXT_WIDTH,
        freq_dim=8,
        rope_max_seq_len=64,
        **tiny.HEADS,
    )


def vae(size: int) -> Any:
    """`AutoencoderKLWan`; two steps in time, as the real one has, take two in space."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=tiny.VAE_CHANNELS,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * tiny.VAE_CHANNELS,
        latents_std=[1.5] * tiny.VAE_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def pipeline(parts: dict[str, Any]) -> Any:
    """`WanPipeline`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)


def text_parts(encoder: WanEncoderConfig) -> list[tuple[str, Any]]:
    """UMT5 and its tokenizer, which is T5's."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny.t5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=tiny.TEXT_WIDTH,
        d_kv=8,
        d_ff=tiny.TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
    )
    return [("text_encoder", UMT5EncoderModel(config)), ("tokenizer", tokenizer)]
