"""The teacher in fp8: what its products are, whom they concern, and how they are measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piflow.backbones import FluxBackbone
from piflow.config import LoRAConfig, RecipeError, load_recipe
from piflow.roles.fp8 import (
    Fp8Linear,
    Fp8Linears,
    TeacherPrecisionError,
    check_error,
    velocity_error,
)
from piflow.roles.trio import Trio
from piflow.training.build import build_trio
from tests.unit.sharding import training
from tests.unit.sharding.training import FULL, LORA, Run

KEPT = ["model.fp8_teacher.keep_weights=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    training.save_model(folder)
    return folder


def e4m3(rows: Tensor) -> Tensor:
    """Rows through 8 bits and back, in float64: the largest value becomes 448, e4m3's largest."""
    scale = rows.abs().amax(-1, keepdim=True) / 448
    return (rows / scale).to(torch.float8_e4m3fn).double() * scale.double()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 48)
        self.narrow = nn.Linear(64, 40)  # no multiple of 16

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.narrow(x)


def test_products_are_those_of_rounded_rows() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 9, 64)
    linear, (exact, narrow) = block.linear, block(x)
    expected = e4m3(x) @ e4m3(linear.weight.detach()).T + linear.bias.detach().double()
    linears = Fp8Linears(block, (Block,))
    with torch.no_grad(), linears.active():
        got, kept = block(x)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert (got - exact).norm() > 0.01 * exact.norm()
    assert torch.equal(kept, narrow)
    assert torch.equal(block(x)[0], exact), "only inside of `active`"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_give_what_weights_of_a_call_give(dtype: torch.dtype) -> None:
    """To the bit, in every call; the weight itself isn't looked at again."""
    torch.manual_seed(0)
    block, other = Block().to(dtype), Block().to(dtype)
    other.load_state_dict(block.state_dict())
    anew, kept = Fp8Linears(block, (Block,)), Fp8Linears(other, (Block,), keep=True)
    for number in range(2):
        x = torch.randn(2, 9, 64).to(dtype)
        with torch.no_grad(), anew.active(), kept.active():
            assert torch.equal(block(x)[0], other(x)[0]), number
    x, before = torch.randn(2, 9, 64).to(dtype), other.linear.weight.clone()
    with torch.no_grad(), kept.active():
        expected = other(x)[0]
        other.linear.weight.zero_()
        assert torch.equal(other(x)[0], expected)
        other.linear.weight.copy_(before)
    exact = torch.nn.functional.linear(x, before, other.linear.bias)
    assert torch.equal(other(x)[0], exact), "only inside of `active`"


def test_a_vector_a_sample_is_not_rounded() -> None:
    block, x = Block(), torch.randn(2, 64)
    expected = block(x)[0]
    with Fp8Linears(block, (Block,)).active():
        assert torch.equal(block(x)[0], expected)


def test_a_model_without_a_fitting_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="in multiples of 16"):
        Fp8Linears(nn.Linear(64, 48), (Block,))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("scenario", [LORA, FULL])
def test_the_teacher_alone_is_in_fp8(scenario: str, keep: bool, folder: Path) -> None:
    """Student and EMA are the same to the bit, in values and gradients, and so is the base."""
    recipe = training.recipe_of(Run(scenario, "single"), folder)
    plain, ours = build_trio(recipe), build_trio(recipe)
    ours.use_fp8_teacher(keep=keep)
    x, sigma, cond = training.inputs(0, 0)
    teacher = plain.teacher_velocity(x, sigma, cond)
    off = (ours.teacher_velocity(x, sigma, cond) - teacher).norm() / teacher.norm()
    assert 1e-4 < off < 0.1
    with ours.exact_teacher():
        assert torch.equal(ours.teacher_velocity(x, sigma, cond), teacher)
    gradients = []
    for trio in (plain, ours):
        torch.manual_seed(7)
        policy = trio.student(x, sigma, cond)
        trio.teacher_velocity(x, sigma, cond)
        policy.velocity(x, 0.5 * sigma).square().mean().backward()
        gradients.append({n: p.grad for n, p in trio.trainable_parameters().items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    averages = [trio.ema(x, sigma, cond).velocity(x, 0.5 * sigma) for trio in (plain, ours)]
    assert torch.equal(*averages)
    for module, other in zip(plain.modules, ours.modules, strict=True):
        for (name, weight), same in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(weight, same) and weight.dtype == same.dtype, name


def test_adapters_and_output_layers_are_left_out(folder: Path) -> None:
    backbone = FluxBackbone.load(folder / "flux")
    trio = Trio.from_backbone(
        backbone,
        LoRAConfig(rank=16),
        training.recipe_of(Run(LORA, "single")).policy,
        None,
        generator=torch.Generator(),
    )
    trio.use_fp8_teacher()
    switched = {n for n, m in backbone.module.named_modules() if isinstance(m, Fp8Linear)}
    assert "single_transformer_blocks.0.proj_mlp.base_layer" in switched
    assert all("_blocks." in name and ".lora_" not in name for name in switched)


def test_the_error_is_relative_and_follows_the_reference() -> None:
    """A velocity that is 1 % too long; the reference's own path, x = c + (x1 - c) sigma."""
    generator = torch.Generator().manual_seed(0)
    end, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    seen: list[Tensor] = []

    def reference(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return (x - end) / sigma.view(-1, 1, 1, 1)

    sums = velocity_error(lambda x, s: 1.01 * reference(x, s), reference, noise, [1.0, 0.5, 0.0])
    off, length = sums.tolist()
    assert math.sqrt(off / length) == pytest.approx(0.01, rel=1e-4)
    assert length == pytest.approx(2 * float((noise - end).double().square().sum()), rel=1e-5)
    torch.testing.assert_close(seen[-1], (noise + end) / 2)


def test_too_large_an_error_stops() -> None:
    check_error(3, 0.1, 0.1)
    for error in (0.11, math.nan):
        with pytest.raises(TeacherPrecisionError, match=f"step 3: .* off by {error:.3g} .* is 0.1"):
            check_error(3, error, 0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["objective.type=flow_matching", "objective.pictures=emoji"], "has none; leave it out"),
        (["runtime.compile=true"], "can't trace how model.fp8_teacher quantises"),
        ([*KEPT, "runtime.strategy=fsdp", "runtime.reshard_after_forward=false"], "whole already"),
        ([*KEPT, "runtime.activation_checkpointing=selective"], "would find other operations"),
        ([*KEPT, "runtime.strategy=deepspeed", "runtime.deepspeed={stage: 3}"], "or FSDP's shards"),
    ],
)
def test_what_has_no_fp8_teacher_refuses_it(changes: list[str], reason: str) -> None:
    recipe = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"
    changes = [*changes, "runtime.num_workers=2"] if changes[:1] == KEPT else changes
    if "objective" in changes[0]:
        recipe = recipe.with_name("emoji-teacher.yaml")
    with pytest.raises(RecipeError, match=reason):
        load_recipe(recipe, ["model.fp8_teacher={}", *changes])


def test_how_often_it_is_measured_is_not_part_of_a_runs_identity() -> None:
    path = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"
    ways: list[Any] = [[], ["model.fp8_teacher={}"], ["model.fp8_teacher.max_error=0.5"], KEPT]
    plain, fp8, other, kept = (load_recipe(path, way).hash() for way in ways)
    assert plain != fp8 == other == kept
