"""Recomputed and compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from piflow.config import GMFlowPolicyConfig, LoRAConfig, RuntimeConfig
from piflow.roles.trio import Trio
from piflow.training.blocks import prepare_blocks
from piflow.training.build import build_trio
from tests.unit.models import case
from tests.unit.sharding import training
from tests.unit.sharding.training import AGAIN, COMPILE, LORA, SOME_AGAIN, Run


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def gradients(trio: Trio, size: int) -> dict[str, torch.Tensor]:
    """Of a student's step on `size` x `size` latents."""
    x, sigma, cond = training.inputs(0, 0)
    x = torch.nn.functional.interpolate(x, size=(size, size))
    torch.manual_seed(1)
    training.student_loss(trio, x, sigma, cond).backward()
    found = {}
    for name, parameter in trio.trainable_parameters().items():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def built(folder: Path, *options: str, backend: str = "aot_eager") -> Trio:
    recipe = training.recipe_of(Run(LORA, "single", options), folder)
    trio = build_trio(recipe)
    prepare_blocks(recipe.runtime, trio.backbone, trio.modules, backend=backend)
    return trio


def test_compilations_are_bounded_and_change_nothing(folder: Path) -> None:
    """Once a kind of block, role and flow of gradients; once more for all sizes."""
    plain, compiled = built(folder), built(folder, COMPILE, backend="eager")
    graphs = []
    for size in (8, 8, 12, 8, 16, 20, 12):
        expected, got = gradients(plain, size), gradients(compiled, size)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [7, 7, 16, 16, 16, 16, 16]
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", ["flux2", "qwen_image", "sd3"])
def test_no_block_of_any_family_breaks_into_pieces(family: str) -> None:
    """With adapters and without; Qwen-Image's without a mask and with."""
    backbone, (x, sigma, cond) = case(family)
    trio = Trio.from_backbone(
        backbone,
        LoRAConfig(rank=2, dropout=0.0),
        GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8),
        None,
        generator=torch.Generator().manual_seed(0),
    )
    prepare_blocks(RuntimeConfig(compile=True), backbone, trio.modules, backend="eager")
    trio.teacher_velocity(x, sigma, cond)
    trio.student(x, sigma, replace(cond, full=True))
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]


@pytest.mark.inductor
def test_the_default_compiler(folder: Path) -> None:
    """Its random numbers are torch's: LoRA dropout is the same."""
    plain, compiled = built(folder), built(folder, COMPILE, AGAIN, backend="inductor")
    expected, got = gradients(plain, 8), gradients(compiled, 8)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_selective_checkpointing_keeps_products_and_full_keeps_inputs(folder: Path) -> None:
    """Bytes kept for the backward pass, and matrix products that it runs."""
    kept, products = {}, {}
    for options in ((), (SOME_AGAIN,), (AGAIN,)):
        trio = built(folder, *options)
        x, sigma, cond = training.inputs(0, 0)
        with _Products() as forward:
            loss = training.student_loss(trio, x, sigma, cond)
        with _Products() as backward:
            loss.backward()
        kept[options], products[options] = forward.count, backward.count
    assert len(set(kept.values())) == 1
    assert products[()] == products[SOME_AGAIN,] < products[AGAIN,]


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*arguments, **(options or {}))
