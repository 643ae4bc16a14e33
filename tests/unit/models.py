"""A tiny transformer of every family: class and configuration."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

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
        {"in_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 3, **HEADS},
    ),
}
