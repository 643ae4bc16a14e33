"""Attention's kernel: what auto chooses, what is refused, and that the models call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch

from piflow.config import Recipe, RecipeError, parse_recipe
from piflow.training import attention
from piflow.training.attention import choose_attention, use_attention
from tests.unit.models import case

CPU = torch.device("cpu")
HOPPER, AMPERE = (9, 0), (8, 0)


def recipe(kernel: str = "auto", family: str = "flux", **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": "m", "family": family, "dtype": "bfloat16",
                      **sections.pop("model", {})},
            "encoder": {"type": "bert", "path": "unused"},
            "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 16},
            "objective": {"type": "pi_id"},
            "policy": {"num_gaussians": 3},
            "guidance": {"scale": 1.0},
            "runtime": {"attention": kernel, "use_gpu": True, **sections.pop("runtime", {})},
            **sections,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "gpu", "dispatched", "kernel", "reason"),
    [
        ({}, None, True, "native", "there is no GPU"),
        ({}, HOPPER, True, "native_cudnn", "compute capability 9.0"),
        ({}, (12, 0), True, "native_cudnn", "compute capability 12.0"),
        ({}, AMPERE, True, "native", "flash attention, compute capability 8.0"),
        ({"family": "qwen_image"}, HOPPER, True, "native", "qwen_image masks some"),
        ({"model": {"dtype": "float32"}}, HOPPER, True, "native", "float32"),
        ({"lora": None}, HOPPER, True, "native", "float32"),
        ({"family": "sd3"}, HOPPER, False, "native", "lets nobody choose for sd3"),
        ({"kernel": "native_flash"}, HOPPER, True, "native_flash", "runtime.attention says so"),
        ({"kernel": "native"}, HOPPER, False, "native", "runtime.attention says so"),
    ],
)
def test_choice(
    changes: dict[str, Any],
    gpu: tuple[int, int] | None,
    dispatched: bool,
    kernel: str,
    reason: str,
) -> None:
    chosen, why = choose_attention(recipe(**changes), gpu, dispatched=dispatched)
    assert chosen == kernel and why.startswith(f"{kernel}: ") and reason in why


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package flash-attn"):
        choose_attention(recipe("flash"), HOPPER, dispatched=True)


@pytest.mark.parametrize("family", ["sd3", "dit"])
def test_models_that_call_pytorchs(family: str) -> None:
    backbone, _ = case(family)
    with pytest.raises(ValueError, match=f"model.family = {family}, which calls PyTorch's"):
        use_attention(recipe("native_cudnn", family="sd3").model_copy(
            update={"model": recipe().model.model_copy(update={"family": family})}
        ), [backbone.module], CPU)  # fmt: skip
    backbone, _ = case(family)
    assert use_attention(recipe(family="sd3"), [backbone.module], CPU).startswith("native:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "sage"}, "'native_efficient' or 'flash'"),
        ({"kernel": "flash_hub"}, "'auto', 'native', 'native_cudnn'"),
        ({"kernel": "flash", "runtime": {"use_gpu": False}}, "flash is a kernel for GPUs"),
        ({"kernel": "flash", "family": "qwen_image"}, "takes no mask"),
        ({"kernel": "native_flash", "family": "qwen_image"}, "takes no mask"),
        ({"kernel": "flash", "model": {"dtype": "float32"}}, "this recipe's base is float32"),
        ({"kernel": "native_cudnn", "lora": None}, r"student \(full training\) is float32"),
        (
            {
                "kernel": "native_efficient",
                "runtime": {"context_parallel": 2, "num_workers": 2},
                "lora": {"dropout": 0.0},
            },
            "no context parallelism",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image"])
def test_every_attention_calls_the_kernel_and_nothing_else_of_the_process(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel for CPUs that PyTorch has besides its own choice stands in for a GPU's."""
    backbone, inputs = case(family)
    other, _ = case(family)
    expected = backbone.teacher_velocity(*inputs)
    calls: list[str] = []
    for name in ("_NATIVE_EFFICIENT", "NATIVE"):
        key = attention_dispatch.AttentionBackendName[name]

        def counted(*args: Any, named: str = name, **options: Any) -> Any:
            calls.append(named)
            options.pop("return_lse", None)
            return attention_dispatch._native_math_attention(*args, **options)

        registry = attention_dispatch._AttentionBackendRegistry
        monkeypatch.setitem(registry._backends, key, counted)
    use_attention(recipe("native_efficient", family=family), [backbone.module], CPU)
    velocity = backbone.teacher_velocity(*inputs)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    blocks = [m for m in backbone.module.modules() if isinstance(m, backbone.block_classes)]
    assert calls == ["_NATIVE_EFFICIENT"] * len(blocks)
    calls.clear()
    other.teacher_velocity(*inputs)
    assert calls == ["NATIVE"] * len(blocks)
