"""The adapters under test: the families and the documentation's example, or --backbone's.

An adapter comes as a function that returns

    (backbone, conditioning, (height, width))

a fresh tiny backbone in float32 and evaluation mode, with random weights that are the same at every
call; three prompts that all differ, of different lengths if the family's text is ragged; and the
latents' size, not square if the family allows that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

from piflow.backbones import (
    Backbone,
    Conditioning,
    DiTBackbone,
    Flux2Backbone,
    FluxBackbone,
    QwenImageBackbone,
    SD3Backbone,
)

Case = tuple[Backbone, Conditioning, tuple[int, int]]


def flux() -> Case:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), torch.randn(3, 5))
    return FluxBackbone(model.eval()), cond, (4, 8)


def flux2() -> Case:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4))
    return Flux2Backbone(model.eval(), embedded_guidance=4.0), cond, (4, 8)


def qwen_image() -> Case:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        axes_dims_rope=(2, 2, 4),
    )
    cond = Conditioning(torch.randn(3, 5, 6), torch.tensor([5, 1, 3]))
    return QwenImageBackbone(model.eval()), cond, (4, 8)


def sd3() -> Case:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), torch.randn(3, 5))
    return SD3Backbone(model.eval()), cond, (4, 8)


def dit() -> Case:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    classes = torch.tensor([[0.0], [7.0], [10.0]])  # 10 is the null class
    cond = Conditioning(torch.zeros(3, 1, 1), torch.ones(3, dtype=torch.long), classes)
    return DiTBackbone(model.eval()), cond, (8, 8)


def documented() -> Case:
    """The worked example of docs/bring-your-own-teacher.md."""
    from bria_family import tiny

    return tiny.case()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--backbone")
    cases = [_import(named)] if named else [flux, flux2, qwen_image, sd3, dit, documented]
    metafunc.parametrize("make", cases, ids=[case.__name__ for case in cases])


def _import(name: str) -> Callable[[], Case]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise pytest.UsageError(f"--backbone: expected module:function, got {name!r}")
    case: Callable[[], Case] = getattr(importlib.import_module(module), function)
    return case
