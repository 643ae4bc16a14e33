"""A tiny transformer of every family: class and configuration, and one with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

from piflow.backbones import (
    Backbone,
    Conditioning,
    DiTBackbone,
    Flux2Backbone,
    FluxBackbone,
    FluxKontextBackbone,
    QwenImageBackbone,
    QwenImageEditBackbone,
    SD3Backbone,
    WanBackbone,
    ZImageBackbone,
)
from piflow.config import find_family

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2}
TEXT = {"in_channels": 16, "joint_attention_dim": 6, "axes_dims_rope": [2, 2, 4]}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (
        FluxTransformer2DModel,
        {"num_single_layers": 1, "pooled_projection_dim": 5, **TEXT, **HEADS},
    ),
    "flux2": (
        Flux2Transformer2DModel,
        {
            "in_channels": 16,
            "num_single_layers": 1,
            "timestep_guidance_channels": 8,
            "joint_attention_dim": 6,
            "axes_dims_rope": [2, 2, 2, 2],
            "guidance_embeds": False,
            **HEADS,
        },
    ),  # fmt: skip
    "qwen_image": (QwenImageTransformer2DModel, {"out_channels": 4, **TEXT, **HEADS}),
    "sd3": (
        SD3Transformer2DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 8,
            "joint_attention_dim": 6,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 5,
            "pos_embed_max_size": 8,
            **HEADS,
        },
    ),
    "dit": (
        DiTTransformer2DModel,
        {"in_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 10, **HEADS},
    ),
}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {  # most of whose code others of MODELS share
    "flux2_klein": MODELS["flux2"],
    "flux_kontext": MODELS["flux"],
    "qwen_image_edit": MODELS["qwen_image"],
    "wan": (
        WanTransformer3DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "ffn_dim": 16,
            "text_dim": 6,
            "freq_dim": 8,
            "rope_max_seq_len": 16,
        },
    ),
    "z_image": (
        ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 6,
            "axes_dims": [2, 2, 4],
            "axes_lens": [64, 16, 16],
        },
    ),
}
BACKBONES: dict[str, Callable[[Any], Backbone]] = {
    "flux": FluxBackbone,
    "flux2": Flux2Backbone,
    "flux2_klein": Flux2Backbone,
    "flux_kontext": FluxKontextBackbone,
    "qwen_image": QwenImageBackbone,
    "qwen_image_edit": QwenImageEditBackbone,
    "sd3": SD3Backbone,
    "wan": WanBackbone,
    "z_image": ZImageBackbone,
    "dit": DiTBackbone,
}


def case(family: str) -> tuple[Any, tuple[torch.Tensor, torch.Tensor, Conditioning]]:
    """A fresh tiny backbone, the same at every call, and its inputs.

    Inputs: latents (3, C, H, W), sigma (3,), Conditioning of three prompts.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class, config = {**MODELS, **OTHERS}[family]
        backbone = BACKBONES[family](model_class(**config).eval())
        size = (8, 8) if family == "dit" else (4, 8)
        x = torch.randn(3, backbone.latent_channels, *size)
        cond = _conditioning(family)
        if find_family(family).edits is not None:
            cond = cond.editing(torch.randn(3, backbone.latent_channels, 4, 4))
        return backbone, (x, torch.tensor([1.0, 0.6, 0.2]), cond)


def _conditioning(family: str) -> Conditioning:
    if family == "dit":
        classes = torch.tensor([[0.0], [7.0], [10.0]])  # 10 is the null class
        return Conditioning(torch.zeros(3, 1, 1), torch.ones(3, dtype=torch.long), classes)
    if family in ("qwen_image", "qwen_image_edit", "wan", "z_image"):
        return Conditioning(torch.randn(3, 5, 6), torch.tensor([5, 1, 3]))
    pooled = None if family.startswith("flux2") else torch.randn(3, 5)
    return Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), pooled)
