"""What passes without values come to, against the same passes with values on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from piflow.backbones import Conditioning
from piflow.config import DXPolicyConfig, Recipe
from piflow.imitation import ImitationSettings, run_data_free
from piflow.planning.model import backbone_of, model_of
from piflow.planning.passes import (
    BACKWARD,
    STUDENT,
    TEACHER,
    Checkpointing,
    Passes,
    Passing,
)
from piflow.planning.sizes import latent_size, tokens_of
from piflow.policies import GMFlowPolicy
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.schedule import FewStep
from tests.unit.planning.cases import CONFIGS, SIDE, TOKENS, real, recipe

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Recipe, Passing]]:
    folder, found = tmp_path_factory.mktemp("configs"), dict[str, tuple[Recipe, Passing]]()

    def count(family: str) -> tuple[Recipe, Passing]:
        if family not in found:
            wanted = recipe(folder, family)
            found[family] = wanted, Passing(wanted, backbone_of(wanted)[0])
        return found[family]

    return count


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call's result holds on the CPU, and the most that it held."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        result = function()
    level = peak = 0
    assert recording.profiler is not None and recording.profiler.kineto_results is not None
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    del result
    return level, peak


def saved(trio: Trio, forward: Callable[[], GMFlowPolicy]) -> int:
    """Bytes of the storages that autograd keeps and those of the policy, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for m in trio.modules for p in m.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
        for value in vars(result.mixture).values():
            if isinstance(value, torch.Tensor):
                pack(value)
        total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def gm_student(
    trio: Trio, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning
) -> GMFlowPolicy:
    policy = trio.student(x, sigma, cond)
    assert isinstance(policy, GMFlowPolicy)
    return policy


@pytest.mark.parametrize("family", CONFIGS)
def test_activations_are_what_autograd_keeps(
    family: str, counted: Callable[[str], tuple[Recipe, Passing]]
) -> None:
    """Within 10 %, with every kind of checkpointing; six blocks are counted from three."""
    wanted, passing = counted(family)
    trio, x, cond = real(wanted)
    sigma = torch.ones(len(x))
    sizes = []
    for mode in MODES:
        if mode != "none":
            trio.enable_gradient_checkpointing(selective=mode == "selective")
        predicted = passing.measure(mode).kept
        held, _ = allocated(lambda: trio.student(x, sigma, cond))
        assert predicted == pytest.approx(held, rel=0.1), mode
        if mode != "selective":  # which keeps products besides autograd
            kept = saved(trio, lambda: gm_student(trio, x, sigma, cond))
            assert predicted == pytest.approx(kept, rel=0.1), mode
        sizes.append(predicted)
    assert sizes[0] > 1.2 * sizes[1] > 1.2 * sizes[2]


def test_a_student_of_its_own_keeps_as_much(tmp_path: Path) -> None:
    """Full training: three modules, whose blocks are shortened alike."""
    wanted = recipe(tmp_path, "dit", lora=None)
    predicted = Passing(wanted, backbone_of(wanted)[0]).measure("none")
    trio, x, cond = real(wanted)
    held, _ = allocated(lambda: trio.student(x, torch.ones(len(x)), cond))
    assert predicted.kept == pytest.approx(held, rel=0.1)
    forward = sum(predicted.flops(STUDENT).values())
    assert sum(predicted.flops(BACKWARD).values()) == pytest.approx(2 * forward, rel=0.2)


@pytest.mark.parametrize("family", CONFIGS)
def test_products_are_those_of_the_closed_form(
    family: str, counted: Callable[[str], tuple[Recipe, Passing]]
) -> None:
    """The teacher's exactly; a backward pass with frozen weights is about as much again."""
    wanted, passing = counted(family)
    backbone, _ = backbone_of(wanted)
    height, width = latent_size(wanted)
    forward = wanted.training.micro_batch_size * backbone.flops(height, width, TOKENS)
    passes = passing.measure("none")
    assert sum(passes.flops(TEACHER).values()) == forward
    student, backward = (sum(passes.flops(phase).values()) for phase in (STUDENT, BACKWARD))
    assert forward < student < 2 * forward
    assert 0.8 * student < backward < 2.5 * student
    again = sum(passing.measure("full").flops(BACKWARD).values())
    assert again == pytest.approx(backward + student, rel=0.15)


def step(trio: Trio, wanted: Recipe, x: torch.Tensor, cond: Conditioning) -> None:
    """A segment, as `Passing` counts it."""
    objective = wanted.distillation()
    guided = GuidedTeacher(trio, cond, None, wanted.guidance)
    settings = ImitationSettings(
        objective.num_intermediate_states, objective.window_substeps, dropout=0.1
    )
    parts = run_data_free(
        lambda x, sigma: trio.student(x, sigma, cond),
        guided,
        x,
        FewStep.of(objective),
        settings,
        generator=torch.Generator().manual_seed(0),
    )
    loss, _ = next(parts)
    loss.backward()


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_steps_peak_is_that_of_the_cpu(
    family: str, counted: Callable[[str], tuple[Recipe, Passing]]
) -> None:
    """Within 10 %, above weights and gradients, from the allocator's own record."""
    wanted, passing = counted(family)
    trio, x, cond = real(wanted)
    for parameter in trio.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    for mode in MODES:
        if mode != "none":
            trio.enable_gradient_checkpointing(selective=mode == "selective")
        passes = passing.measure(mode)
        _, peak = allocated(lambda: step(trio, wanted, x, cond))
        assert passes.kept + passes.policy + passes.working == pytest.approx(peak, rel=0.1), mode


def test_many_samples_are_so_many_times_some(tmp_path: Path) -> None:
    def count(samples: int) -> Passes:
        training = {"batch_size": samples, "micro_batch_size": samples}
        wanted = recipe(tmp_path, "dit", training=training)
        return Passing(wanted, backbone_of(wanted)[0]).measure("none")

    some, many = count(64), count(10**9)
    assert many.kept == pytest.approx(some.kept * 10**9 / 64)
    flops = sum(many.flops(TEACHER).values()), sum(some.flops(TEACHER).values())
    assert flops[0] == pytest.approx(flops[1] * 10**9 / 64)


def test_a_picture_to_be_edited_is_counted(
    tmp_path: Path, counted: Callable[[str], tuple[Recipe, Passing]]
) -> None:
    """Its tokens take part in all blocks: in operations, activations and the store."""
    embed = {"condition_column": "from", "condition_sizes": [[32, 32], [32, 48]]}
    wanted = recipe(tmp_path, "flux", model={"family": "flux_kontext"}, embed=embed)
    shown = 8 * 12
    assert tokens_of(wanted) == 8 * 8 + shown + TOKENS
    backbone = backbone_of(wanted)[0]
    forward = 2 * backbone.editing_flops(16, 16, TOKENS, shown)
    passes = Passing(wanted, backbone_of(wanted)[0]).measure("none")
    assert sum(passes.flops(TEACHER).values()) == forward
    without = counted("flux")[1].measure("none")
    assert passes.kept > 2 * without.kept and passes.policy == without.policy


def test_tokens_are_patches_of_the_largest_picture_and_the_prompt(tmp_path: Path) -> None:
    assert tokens_of(recipe(tmp_path, "flux")) == (SIDE // 4) ** 2 + TOKENS
    buckets = {"buckets": [[64, 16], [32, 32], [8, 8]]}
    assert tokens_of(recipe(tmp_path, "flux", embed=buckets)) == 8 * 8 + TOKENS
    vae = recipe(tmp_path, "flux", model={"codec": "vae"})
    assert tokens_of(vae) == 2 * 2 + TOKENS
    assert tokens_of(recipe(tmp_path, "dit")) == 8 * 8, "a class is no token"


@pytest.mark.parametrize("changed", [{}, {"lora": None}, {"policy": DXPolicyConfig()}])
def test_weights_are_those_of_the_trio(changed: dict[str, object], tmp_path: Path) -> None:
    for family in CONFIGS:
        wanted = recipe(tmp_path, family).model_copy(update=changed)
        model = model_of(wanted, *backbone_of(wanted))
        trio, _, _ = real(wanted)
        own = [*trio.trainable_parameters().values(), *trio.ema_parameters().values()]
        everything = sum(p.nbytes for module in trio.modules for p in module.parameters())
        assert model.trained == sum(p.numel() for p in trio.trainable_parameters().values())
        assert model.head == sum(p.numel() for p in trio.head.parameters())
        assert model.base_bytes == everything - sum(p.nbytes for p in own)
        assert sum(unit.nbytes() for unit in model.units) == everything
