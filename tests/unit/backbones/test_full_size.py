"""The published models, on the meta device: sizes, LoRA in every block, blocks to shard, and what
their matrix products are computed in.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from piflow.backbones import Conditioning, family_class
from piflow.config import GMFlowPolicyConfig
from piflow.config.model import ComputeDtype
from piflow.policies import GMFlowPolicy
from piflow.roles import lora
from piflow.roles.heads import build_head
from piflow.roles.trio import STUDENT, SharedBackbone, Trio

SD35_LARGE: dict[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
WAN_1_3B: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# family -> class, config, embedded guidance, parameters, blocks
MODELS: dict[str, tuple[Any, dict[str, Any], float | None, int, int]] = {
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}, 3.5, 11_901_408_320, 19 + 38),
    "flux2": (Flux2Transformer2DModel, {}, 4.0, 32_223_281_152, 8 + 48),
    "qwen_image": (QwenImageTransformer2DModel, {}, None, 20_430_401_088, 60),
    "sd3": (SD3Transformer2DModel, SD35_LARGE, None, 8_056_627_520, 38),
    "z_image": (ZImageTransformer2DModel, {}, None, 6_154_908_736, 30 + 2 + 2),
    "wan": (WanTransformer3DModel, WAN_1_3B, None, 1_418_996_800, 30),
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


class LinearProducts(TorchDispatchMode):
    """Counts the operations of linear layers by the dtype of their factors.

    Not those of attention, which the meta device takes apart into products (`bmm`) that no GPU
    kernel makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            assert args[-1].dtype == args[-2].dtype == out.dtype
            self.flops[out.dtype] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out

    def share(self, dtype: torch.dtype) -> float:
        return self.flops[dtype] / self.flops.total()


def empty_trio(family: str, compute_dtype: ComputeDtype, **layers: int) -> Trio:
    """A bfloat16 teacher and a student with LoRA of rank 256, without storage."""
    model_class, config, guidance, *_ = MODELS[family]
    with torch.device("meta"):
        model = model_class(**config, **layers).to(torch.bfloat16)
    kind: Any = family_class(family)
    for name in kind.output_names:  # the student's head copies their values
        model.get_submodule(name).to_empty(device="cpu")
    backbone = kind(model, embedded_guidance=guidance)
    names = lora.resolve_targets(model, backbone.default_lora_targets, skip=kind.output_names)
    ranks = dict.fromkeys(names, 256)
    lora.add_layers(model, STUDENT, ranks, dropout=0.05, compute_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(0)
    head = build_head(backbone.output_layer(), GMFlowPolicyConfig(), None, generator=generator)
    trio = Trio(SharedBackbone(backbone, {STUDENT: head}))
    model.to("meta")
    return trio


TEXT = {"flux": (4096, 768), "qwen_image": (3584, None)}  # width of token states, pooled vector


def inputs(family: str) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """One sample of 1024 x 1024 and 512 text tokens."""
    width, pooled = TEXT[family]
    with torch.device("meta"):
        tokens, vector = torch.empty(1, 512, width), pooled and torch.empty(1, pooled)
        return (
            torch.empty(1, 16, 128, 128),
            torch.ones(1),
            Conditioning(tokens, torch.full((1,), 512), vector),
        )


@pytest.mark.parametrize("family", TEXT)
def test_linear_layers_are_computed_in_the_dtype_of_the_base(family: str) -> None:
    """Forward and backward; tensor cores multiply float32 at a tenth of the speed or less."""
    trio = empty_trio(family, "base")
    with LinearProducts() as teacher:
        trio.teacher_velocity(*inputs(family))
    assert teacher.share(torch.bfloat16) > 0.9995
    with LinearProducts() as student:
        policy = trio.student(*inputs(family))
        assert isinstance(policy, GMFlowPolicy)
        forward = student.flops.total()
        (policy.mixture.logweights.sum() + policy.velocity(*inputs(family)[:2]).sum()).backward()
    assert student.share(torch.bfloat16) > 0.995
    assert 1.95 < student.flops.total() / forward < 2.2, "the backward pass is in it"
    gradients = [p.grad for p in trio.trainable_parameters().values()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in gradients)


def test_lora_in_float32_is_seen_in_the_count() -> None:
    trio = empty_trio("flux", "float32", num_layers=2, num_single_layers=4)
    with LinearProducts() as student:
        trio.student(*inputs("flux"))
    assert 0.05 < student.share(torch.float32) < 0.1
