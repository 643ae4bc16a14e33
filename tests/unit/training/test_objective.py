"""Objectives on one micro-batch: what reaches the model, and the parts of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from piflow.backbones import Conditioning, PixelCodec
from piflow.config import FlowMatchingConfig, Recipe, parse_recipe
from piflow.imitation import ImitationSettings
from piflow.policies import GMFlowPolicy
from piflow.schedule import FlowSchedule, segments
from piflow.training.build import build_trio
from piflow.training.objective import (
    CleanLatents,
    FlowMatchingObjective,
    PiIDObjective,
    drawn_latents,
    stored_latents,
)
from piflow.training.step import micro_batch_generator

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prompts:
    """Three prompts of 16 x 8 pixels."""

    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor
    index: int = 0
    height: int = 16
    width: int = 8
    prompts: tuple[str, ...] = ("a", "b", "c")
    prompt_ids: tuple[str, ...] = ("1", "2", "3")
    latents: Tensor | None = None
    there: None = None


@pytest.fixture
def batch() -> Prompts:
    generator = torch.Generator().manual_seed(5)
    return Prompts(
        torch.randn(3, 4, 6, generator=generator),
        torch.tensor([4, 3, 2]),
        torch.randn(3, 5, generator=generator),
    )


@pytest.fixture
def empty() -> Conditioning:
    return Conditioning(torch.full((1, 4, 6), 9.0), torch.tensor([1]), torch.full((1, 5), 9.0))


# -------------------------------------------------------------------------------------------- π-ID


def recipe(flux_folder: Path, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "unused"},
            "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 8},
            "objective": {"type": "pi_id", "nfe": 3, "total_substeps": 16,
                          "num_intermediate_states": 2},
            "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
            "lora": {"rank": 4, "dropout": 0.0},
            **sections,
        }
    )  # fmt: skip


def draw(prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """Random pictures of 16 x 8 pixels."""
    return torch.rand(len(prompts), 3, 16, 8, generator=generator) * 2 - 1


DRAWN = drawn_latents(PixelCodec(), draw, CPU)


def run_pi_id(
    ours: Recipe,
    batch: Prompts,
    empty: Conditioning,
    step: int = 0,
    clean: CleanLatents | None = None,
) -> tuple[Tensor, list[tuple[float, bool]], dict[str, Tensor]]:
    """Total, the parts of the loss, and the gradients."""
    trio = build_trio(ours)
    parts: list[tuple[float, bool]] = []
    objective = PiIDObjective(trio, PixelCodec(), empty, ours, CPU, clean)
    total = torch.zeros((), dtype=torch.float64)
    for loss, last in objective.losses(batch, step, micro_batch_generator(0, step, 0)):
        parts.append((loss.item(), last))
        total += loss.detach()
        loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trio.trainable_parameters().items()
        if parameter.grad is not None
    }
    return total, parts, gradients


def test_pi_id_yields_a_loss_a_segment(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    total, parts, gradients = run_pi_id(recipe(flux_folder), batch, empty)
    assert [last for _, last in parts] == [False, False, True]
    assert total > 0 and any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_pi_id_is_a_function_of_its_generator(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    ours = recipe(flux_folder)
    total, _, gradients = run_pi_id(ours, batch, empty)
    again, _, same = run_pi_id(ours, batch, empty)
    other, _, _ = run_pi_id(ours, batch, empty, step=1)
    assert torch.equal(total, again) and not torch.equal(total, other)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    "changed", [{"guidance": {"scale": 4.0}}, {"objective": {"type": "pi_id", "loss_scale": 60.0}}]
)
def test_pi_id_follows_the_recipe(
    changed: dict[str, Any], flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    total, _, _ = run_pi_id(recipe(flux_folder, objective={"type": "pi_id"}), batch, empty)
    other, _, _ = run_pi_id(
        recipe(flux_folder, **{"objective": {"type": "pi_id"}, **changed}), batch, empty
    )
    if "guidance" in changed:
        assert not torch.equal(total, other)
    else:
        assert other.item() == pytest.approx(2 * total.item(), rel=1e-6)


def test_pi_id_uses_the_negative_prompt_as_it_is_given(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    other = Conditioning(-empty.tokens, empty.num_tokens, empty.pooled)
    guided, plain = recipe(flux_folder, guidance={"scale": 4.0}), recipe(flux_folder)
    for ours, same in ((guided, False), (plain, True)):
        first, second = (run_pi_id(ours, batch, negative)[0] for negative in (empty, other))
        assert torch.equal(first, second) == same


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_pi_id_trains_dx_students(
    mode: str, flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    """Components are dropped from mixtures only: a DX policy refuses dropout."""
    ours = recipe(flux_folder, policy={"type": "dx", "mode": mode, "num_points": 3})
    total, parts, gradients = run_pi_id(ours, batch, empty)
    assert len(parts) == 3 and total > 0
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_settings_of_a_step_are_the_recipes(flux_folder: Path, empty: Conditioning) -> None:
    ours = recipe(
        flux_folder,
        policy={"num_gaussians": 3, "logstd_inner_dim": 8, "dropout": 0.2},
        objective={"num_intermediate_states": 3, "window_substeps": 5, "num_decay_iters": 10,
                   "total_substeps": 64, "loss_scale": 7.0},
    )  # fmt: skip
    objective = PiIDObjective(build_trio(ours), PixelCodec(), empty, ours, CPU)
    assert objective.settings(4) == ImitationSettings(3, 5, 0.6, 0.2, 7.0)
    assert objective.few_step.total_substeps == 64
    assert objective.settings(400).teacher_ratio == 0.0


DEPENDENT = {"data": "dependent", "pictures": "emoji", "nfe": 3, "total_substeps": 16,
             "num_intermediate_states": 2, "shift": 2.0}  # fmt: skip
SQUARE = {"prompts": "p.txt", "store": "s", "height": 16, "width": 16}


class KnownFlow:
    """In the trio's place: teacher and student know the clean latents; notes the starts."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0
        self.starts: list[tuple[Tensor, Tensor]] = []

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return (x - self.x0) / sigma.view(-1, 1, 1, 1)

    def student(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> GMFlowPolicy:
        self.starts.append((x, sigma))
        means = self.teacher_velocity(x, sigma, cond).unsqueeze(1).requires_grad_()
        logstds = torch.full((len(x), 1, 1, 1, 1), -20.0)
        return GMFlowPolicy(means, logstds, torch.zeros_like(means[:, :, :1]), x, sigma)


def test_data_dependent_pi_id_starts_from_noised_pictures(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    """Each sample at the start of one of the segments, one student call a micro-batch."""
    ours = recipe(flux_folder, objective=DEPENDENT, embed=SQUARE)
    starts = FlowSchedule(2.0).sigma(
        torch.tensor([part.tau_src for part in segments(3, ours.objective.final_step_size_scale)])
    )
    found = []
    for step in range(20):
        replay = micro_batch_generator(0, step, 0)
        x0 = PixelCodec().encode(draw(batch.prompts, replay))
        noise = torch.randn(x0.shape, generator=replay)
        flow: Any = KnownFlow(x0)
        objective = PiIDObjective(flow, PixelCodec(), empty, ours, CPU, DRAWN)
        ((loss, last),) = objective.losses(batch, step, micro_batch_generator(0, step, 0))
        ((x, sigma),) = flow.starts
        torch.testing.assert_close(x, torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1)))
        assert (sigma[:, None] - starts).abs().amin(1).max() < 1e-6
        assert last and loss.item() < 1e-4
        found.append(sigma)
    assert len(torch.cat(found).unique()) == 3  # every segment is drawn at times


def test_stored_latents_are_trained_on_as_they_are(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    """Nothing is drawn for them, so the noise is the generator's first."""
    stored = {"type": "pi_id", "data": "dependent", "pictures": "store", "nfe": 3}
    embed = SQUARE | {"image_column": "image"}
    ours = recipe(flux_folder, objective=stored, embed=embed)
    latents = torch.randn(3, 12, 8, 4, generator=torch.Generator().manual_seed(7))
    flow: Any = KnownFlow(latents)
    objective = PiIDObjective(flow, PixelCodec(), empty, ours, CPU, stored_latents)
    generator = micro_batch_generator(0, 0, 0)
    ((loss, _),) = objective.losses(replace(batch, latents=latents), 0, generator)
    noise = torch.randn(latents.shape, generator=micro_batch_generator(0, 0, 0))
    ((x, sigma),) = flow.starts
    torch.testing.assert_close(x, torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1)))
    assert loss.item() < 1e-4
    with pytest.raises(ValueError, match="brought no latents"):
        list(objective.losses(batch, 0, generator))


def test_data_dependent_pi_id_trains_the_student(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    ours = recipe(flux_folder, objective=DEPENDENT, embed=SQUARE)
    total, parts, gradients = run_pi_id(ours, batch, empty, clean=DRAWN)
    again, _, same = run_pi_id(ours, batch, empty, clean=DRAWN)
    assert [last for _, last in parts] == [True] and total.item() == pytest.approx(parts[0][0])
    assert torch.equal(total, again)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_pi_id_refuses_what_does_not_fit(
    flux_folder: Path, batch: Prompts, empty: Conditioning
) -> None:
    pretraining = recipe(flux_folder, objective={"type": "flow_matching"}, embed=SQUARE)
    flow: Any = KnownFlow(torch.zeros(3, 12, 8, 4))
    with pytest.raises(ValueError, match="expected objective.type pi_id, got flow_matching"):
        PiIDObjective(flow, PixelCodec(), empty, pretraining, CPU)
    with pytest.raises(ValueError, match="data = free needs no source of pictures, got one"):
        PiIDObjective(flow, PixelCodec(), empty, recipe(flux_folder), CPU, DRAWN)
    dependent = recipe(flux_folder, objective=DEPENDENT, embed=SQUARE)
    with pytest.raises(ValueError, match="data = dependent needs a source of pictures, got none"):
        PiIDObjective(flow, PixelCodec(), empty, dependent, CPU)
    squares = drawn_latents(PixelCodec(), lambda prompts, _: torch.zeros(3, 3, 16, 16), CPU)
    wrong = PiIDObjective(flow, PixelCodec(), empty, dependent, CPU, squares)
    with pytest.raises(ValueError, match=r"returned \(3, 3, 16, 16\) for 3 prompts of 16x8 pixels"):
        list(wrong.losses(batch, 0, micro_batch_generator(0, 0, 0)))


# ----------------------------------------------------------------------------------- flow matching


class Oracle:
    """In the backbone's place: knows the clean latents, and notes what it was shown."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0
        self.cond: Conditioning | None = None
        self.sigma = torch.zeros(0)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.sigma, self.cond = sigma, cond
        weight = sigma.view(-1, 1, 1, 1)
        return (x - self.x0) / weight  # ε - x0, since x = x0 + sigma (ε - x0)


def flow_matching(
    oracle: Any, empty: Conditioning, config: FlowMatchingConfig, pictures: Tensor
) -> FlowMatchingObjective:
    def fixed(prompts: Sequence[str], generator: torch.Generator) -> Tensor:
        assert list(prompts) == ["a", "b", "c"]
        return pictures

    return FlowMatchingObjective(
        oracle, drawn_latents(PixelCodec(), fixed, CPU), empty, config, CPU
    )


def test_flow_matching_target_is_noise_minus_data(batch: Prompts, empty: Conditioning) -> None:
    """A model that knows x0 has no loss; one that says nothing has mean |ε - x0|^2."""
    pictures = torch.rand(3, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = PixelCodec().encode(pictures)
    config = FlowMatchingConfig(prompt_dropout=0.0)
    perfect = flow_matching(Oracle(x0), empty, config, pictures)
    ((loss, _),) = perfect.losses(batch, 0, micro_batch_generator(0, 0, 0))
    assert loss < 1e-8
    silent = flow_matching(lambda x, sigma, cond: torch.zeros_like(x), empty, config, pictures)
    ((loss, last),) = silent.losses(batch, 0, micro_batch_generator(0, 0, 0))
    noise = torch.randn(x0.shape, generator=micro_batch_generator(0, 0, 0))
    assert loss.item() == pytest.approx((noise - x0).square().mean().item(), rel=1e-6)
    assert last


def test_noise_levels_are_logit_normal(batch: Prompts, empty: Conditioning) -> None:
    oracle = Oracle(torch.zeros(3, 12, 8, 4))
    config = FlowMatchingConfig(logit_mean=0.7, logit_std=0.5)
    objective = flow_matching(oracle, empty, config, torch.zeros(3, 3, 16, 8))
    logits = []
    for step in range(200):
        list(objective.losses(batch, step, micro_batch_generator(0, step, 0)))
        logits.append(torch.logit(oracle.sigma))
    drawn = torch.cat(logits)
    assert drawn.mean() == pytest.approx(0.7, abs=0.08)
    assert drawn.std() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, False), (1.0, True)])
def test_dropped_prompts_become_the_empty_one(
    share: float, dropped: bool, batch: Prompts, empty: Conditioning
) -> None:
    oracle = Oracle(torch.zeros(3, 12, 8, 4))
    config = FlowMatchingConfig(prompt_dropout=share)
    objective = flow_matching(oracle, empty, config, torch.zeros(3, 3, 16, 8))
    list(objective.losses(batch, 0, micro_batch_generator(0, 0, 0)))
    cond, expected = oracle.cond, empty.expand(3)
    assert cond is not None and cond.pooled is not None and expected.pooled is not None
    assert torch.equal(cond.tokens, expected.tokens if dropped else batch.tokens)
    assert torch.equal(cond.num_tokens, expected.num_tokens if dropped else batch.num_tokens)
    assert torch.equal(cond.pooled, expected.pooled if dropped else batch.pooled)


def test_prompt_dropout_has_its_share(batch: Prompts, empty: Conditioning) -> None:
    oracle = Oracle(torch.zeros(3, 12, 8, 4))
    config = FlowMatchingConfig(prompt_dropout=0.3)
    objective = flow_matching(oracle, empty, config, torch.zeros(3, 3, 16, 8))
    count = 0
    for step in range(300):
        list(objective.losses(batch, step, micro_batch_generator(0, step, 0)))
        assert oracle.cond is not None
        count += int((oracle.cond.num_tokens == 1).sum())
    assert count / 900 == pytest.approx(0.3, abs=0.05)
