"""The published models, on the meta device: sizes, LoRA in every block, blocks to shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

from piflow.backbones import family_class
from piflow.roles import lora

SD35_LARGE: dict[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
# family -> class, config, embedded guidance, parameters, blocks
MODELS: dict[str, tuple[Any, dict[str, Any], float | None, int, int]] = {
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}, 3.5, 11_901_408_320, 19 + 38),
    "flux2": (Flux2Transformer2DModel, {}, 4.0, 32_223_281_152, 8 + 48),
    "qwen_image": (QwenImageTransformer2DModel, {}, None, 20_430_401_088, 60),
    "sd3": (SD3Transformer2DModel, SD35_LARGE, None, 8_056_627_520, 38),
}


@pytest.mark.parametrize("family", MODELS)
def test_full_size(family: str) -> None:
    model_class, config, guidance, parameters, num_blocks = MODELS[family]
    with torch.device("meta"):
        model = model_class(**config)
    backbone: Any = family_class(family)(model, embedded_guidance=guidance)  # type: ignore[call-arg]
    assert sum(p.numel() for p in backbone.module.parameters()) == parameters
    blocks = {
        name
        for name, module in backbone.module.named_modules()
        if isinstance(module, backbone.block_classes)
    }
    assert len(blocks) == num_blocks
    inside = sum(
        p.numel()
        for name, module in backbone.module.named_modules()
        if name in blocks
        for p in module.parameters()
    )
    assert inside > 0.97 * parameters  # what sharding by blocks gathers at once is small
    names = lora.resolve_targets(
        backbone.module, backbone.default_lora_targets, skip=backbone.output_names
    )
    adapted = {block for block in blocks if any(name.startswith(f"{block}.") for name in names)}
    assert adapted == blocks
