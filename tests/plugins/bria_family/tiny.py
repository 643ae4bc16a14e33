"""A tiny random Bria, for `piflow smoke` and the conformance suite."""

from typing import Any

import torch
from diffusers import AutoencoderKL, BriaPipeline, BriaTransformer2DModel

from bria_family import BriaEncoderConfig
from bria_family.backbone import BriaBackbone
from piflow.backbones import Conditioning, tiny
from piflow.config import EncoderConfig, ModelConfig


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> BriaTransformer2DModel:
    return _transformer(4 * tiny.channels(model), tiny.TEXT_WIDTH)


def vae(size: int) -> AutoencoderKL:
    return tiny.kl_vae(size)


def pipeline(parts: dict[str, Any]) -> BriaPipeline:
    return BriaPipeline(scheduler=tiny.flow_scheduler(), **parts)


def text_parts(encoder: BriaEncoderConfig) -> list[tuple[str, Any]]:
    tokenizer = tiny.t5_tokenizer()
    return [("text_encoder", tiny.t5_model(len(tokenizer))), ("tokenizer", tokenizer)]


def case() -> tuple[BriaBackbone, Conditioning, tuple[int, int]]:
    """For the conformance suite: a backbone, three prompts, the latents' height and width."""
    torch.manual_seed(0)
    backbone = BriaBackbone(_transformer(16, 6).eval())
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4))
    return backbone, cond, (4, 8)


def _transformer(in_channels: int, text_width: int) -> BriaTransformer2DModel:
    return BriaTransformer2DModel(
        in_channels=in_channels,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=text_width,
        axes_dims_rope=list(tiny.AXES),
        **tiny.HEADS,
    )
