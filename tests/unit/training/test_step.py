"""The optimiser step on a tiny linear objective, against closed forms."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from piflow.config import EMAConfig, OptimizerConfig, TrainingConfig
from piflow.ema import karras_beta
from piflow.imitation import PartOfLoss
from piflow.sharding.single import SingleStrategy
from piflow.training.step import (
    NonFiniteError,
    SkippedSteps,
    Trainer,
    learning_rate,
    micro_batch_generator,
)


@dataclass(frozen=True)
class Rows:
    """A micro-batch; the objective draws its data from the generator."""

    index: int
    size: int = 2

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(f"prompt {self.index}.{row}" for row in range(self.size))

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        return tuple(f"id-{self.index}-{row}" for row in range(self.size))


class Linear:
    """Least squares on random rows; in two parts, as an objective with segments has them."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.bad: dict[int, float] = {}  # micro-batch index -> factor of its loss

    def loss(self, rows: Tensor) -> Tensor:
        return (rows.to(self.weight) @ self.weight - 1).square().mean()

    def losses(self, batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        rows = torch.randn(batch.size, len(self.weight), generator=generator)
        for share, last in ((0.25, False), (0.75, True)):
            yield share * self.loss(rows) * self.bad.get(batch.index, 1.0), last


def make(
    optimizer: OptimizerConfig | None = None,
    ema: EMAConfig | None = None,
    micro_batches: int = 4,
) -> tuple[Trainer, nn.Parameter]:
    weight = nn.Parameter(torch.linspace(-1, 1, 5))
    training = TrainingConfig(
        steps=20,
        batch_size=2 * micro_batches,
        micro_batch_size=2,
        optimizer=optimizer or OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=1e9),
        ema=ema or EMAConfig(gamma=1.0, start=0),
    )
    trainer = Trainer(
        Linear(weight),
        {"weight": weight},
        {"weight": weight.detach().clone()},
        SingleStrategy(torch.device("cpu")),
        training,
        seed=3,
    )
    return trainer, weight


def batches(count: int = 4) -> list[Rows]:
    return [Rows(index) for index in range(count)]


def data(step: int, count: int = 4) -> Tensor:
    """All rows of a step's global batch."""
    return torch.cat(
        [torch.randn(2, 5, generator=micro_batch_generator(3, step, i)) for i in range(count)]
    )


# ------------------------------------------------------------------------------------- randomness


def test_micro_batch_generator_is_a_pure_function() -> None:
    torch.manual_seed(0)
    first = torch.randn(4, generator=micro_batch_generator(1, 2, 3))
    torch.manual_seed(9)
    assert torch.equal(first, torch.randn(4, generator=micro_batch_generator(1, 2, 3)))


def test_micro_batch_generators_differ_in_every_argument() -> None:
    keys = [(s, t, i) for s in (0, 1, 11) for t in (-1, 0, 1, 11) for i in (0, 1, 11)]
    assert len({micro_batch_generator(*key).initial_seed() for key in keys}) == len(keys)


def test_draws_from_the_global_generator_repeat_too() -> None:
    """LoRA dropout has no generator argument: each micro-batch seeds the global one."""
    drawn: list[Tensor] = []

    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        drawn.append(torch.rand(3))
        loss = weight.sum()
        yield loss, True

    trainer, weight = make()
    trainer.objective = SimpleNamespace(losses=losses)
    trainer.step(5, batches())
    torch.rand(100)
    trainer.step(5, list(reversed(batches())))
    for early, late in zip(drawn[:4], reversed(drawn[4:]), strict=True):
        assert torch.equal(early, late)
    assert not torch.equal(drawn[0], drawn[1])


def test_a_parts_graph_is_gone_before_the_next_part() -> None:
    """So peak memory is one part's: neither the trainer nor the strategy holds on to a loss."""
    trainer, weight = make()
    alive: list[weakref.ref[Tensor]] = []

    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        for last in (False, False, True):
            assert all(loss() is None for loss in alive)
            loss = weight.square().sum()
            alive.append(weakref.ref(loss))
            yield loss, last
            del loss

    trainer.objective = SimpleNamespace(losses=losses)
    trainer.step(0, batches())
    assert len(alive) == 3 * 4


# ---------------------------------------------------------------------------------- learning rate


def test_learning_rate_closed_form() -> None:
    config = OptimizerConfig(lr=8.0, warmup_steps=4, decay_fraction=0.5)
    rates = [learning_rate(step, 16, config) for step in range(17)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    assert rates[4:9] == [8.0] * 5
    assert rates[8:] == [8.0 - count for count in range(9)]


def test_learning_rate_without_warmup_or_decay_is_constant() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=0)
    assert {learning_rate(step, 10, config) for step in range(30)} == {0.5}


def test_the_first_factor_of_the_warm_up() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=4, warmup_start=0.001)
    rates = [learning_rate(step, 100, config) for step in range(6)]
    factors = [0.001, 0.25075, 0.5005, 0.75025, 1.0, 1.0]
    assert rates == pytest.approx([2 * factor for factor in factors])
    flat = config.model_copy(update={"warmup_steps": 0})
    assert learning_rate(0, 100, flat) == 2.0


def test_step_uses_and_reports_the_schedules_rate() -> None:
    config = OptimizerConfig(lr=0.1, warmup_steps=10, clip_norm=1e9, betas=(0.0, 0.0))
    trainer, weight = make(config)
    before = weight.detach().clone()
    metrics = trainer.step(1, batches())
    assert metrics.lr == pytest.approx(0.02)
    # AdamW with betas 0 moves every element by lr against its gradient's sign
    torch.testing.assert_close((weight - before).abs().detach(), torch.full((5,), 0.02), rtol=1e-4,
                               atol=0)  # fmt: skip


# --------------------------------------------------------------------------------------- gradients


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    trainer, weight = make()
    whole = torch.linspace(-1, 1, 5).requires_grad_()
    loss = (data(7) @ whole - 1).square().mean()
    (expected,) = torch.autograd.grad(loss, whole)
    metrics = trainer.step(7, batches())
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert metrics.step == 7


def test_gradients_do_not_leak_into_the_next_step() -> None:
    trainer, weight = make()
    trainer.step(0, batches())
    at = weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((data(1) @ at - 1).square().mean(), at)
    trainer.step(1, batches())
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_clipping_starts_after_warm_up() -> None:
    config = OptimizerConfig(lr=1e-9, warmup_steps=2, clip_norm=0.5)
    trainer, weight = make(config)
    norms = []
    for step in range(4):
        metrics = trainer.step(step, batches())
        assert weight.grad is not None and metrics.grad_norm > 0.5
        norms.append((float(weight.grad.norm()), metrics.grad_norm))
    for clipped, measured in norms[:2]:
        assert clipped == pytest.approx(measured)
    for clipped, _ in norms[2:]:
        assert clipped == pytest.approx(0.5, rel=1e-4)


# ---------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("start", [0, 3])
def test_ema_closed_form(start: int) -> None:
    """Up to `start` a copy; then sum over t of (1 - beta_t) prod_{s > t} beta_s weight_t."""
    trainer, weight = make(ema=EMAConfig(gamma=1.0, start=start))
    history = []
    for step in range(7):
        trainer.step(step, batches())
        history.append(weight.detach().clone())
        if step < start:
            assert torch.equal(trainer.ema_parameters["weight"], history[-1])
    averaged = history[start:]
    betas = [karras_beta(t, gamma=1.0) for t in range(1, len(averaged) + 1)]
    expected = sum(
        (1 - beta) * math.prod(betas[t + 1 :]) * value
        for t, (beta, value) in enumerate(zip(betas, averaged, strict=True))
    )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(trainer.ema_parameters["weight"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trainer.ema_parameters["weight"], history[-1])


def test_fixed_beta_closed_form() -> None:
    """A copy up to `start`, then beta^n copy + (1 - beta) sum of beta^(n - i) weight_i."""
    trainer, weight = make(ema=EMAConfig(beta=0.8, start=2))
    history = []
    for step in range(6):
        trainer.step(step, batches())
        history.append(weight.detach().clone())
    copied, averaged = history[1], history[2:]
    expected = 0.8**4 * copied
    for place, value in enumerate(averaged, start=1):
        expected = expected + 0.2 * 0.8 ** (4 - place) * value
    torch.testing.assert_close(trainer.ema_parameters["weight"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trainer.ema_parameters["weight"], history[-1])


# -------------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_non_finite_loss_names_its_prompts_and_touches_nothing(factor: float) -> None:
    trainer, weight = make(OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=1.0))
    trainer.step(0, batches())
    weights = weight.detach().clone()
    average = trainer.ema_parameters["weight"].clone()
    state = {k: v.clone() for k, v in trainer.optimizers[0].state[weight].items()}
    assert isinstance(trainer.objective, Linear)
    trainer.objective.bad = {2: factor}
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(1, batches())
    message = str(caught.value)
    assert "step 1" in message and "id-2-0, id-2-1" in message and "id-0" not in message
    assert "last checkpoint is good" in message and "training.optimizer.lr" in message
    assert torch.equal(weight, weights)
    assert torch.equal(trainer.ema_parameters["weight"], average)
    for key, value in trainer.optimizers[0].state[weight].items():
        assert torch.equal(value, state[key])


def test_training_goes_on_after_a_refused_step() -> None:
    trainer, weight = make()
    other, expected = make()
    assert isinstance(trainer.objective, Linear)
    trainer.objective.bad = {0: math.nan}
    with pytest.raises(NonFiniteError):
        trainer.step(0, batches())
    trainer.objective.bad = {}
    trainer.step(0, batches())
    other.step(0, batches())
    assert torch.equal(weight, expected)


def test_an_overflowing_gradient_of_a_finite_loss_names_the_batch() -> None:
    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        loss = (weight * 0).sqrt().sum()  # its derivative at 0 is infinite
        yield loss, True

    trainer, weight = make()
    trainer.objective = SimpleNamespace(losses=losses)
    before = weight.detach().clone()
    with pytest.raises(NonFiniteError, match="loss 0.0.*gradient.*id-0-0, .*id-3-1"):
        trainer.step(0, batches())
    assert torch.equal(weight, before)


def _run(first: int, last: int, bad: set[int], training: TrainingConfig) -> list[tuple[int, int]]:
    """What a loop over steps does; returns (step, count) of each, the last may stop it."""
    skipped, seen = SkippedSteps(training), []
    for step in range(first, last):
        if step in bad:
            try:
                skipped.skip(step, NonFiniteError(f"step {step}"))
            except NonFiniteError:
                return [*seen, (step, -1)]
        seen.append((step, skipped.count(step)))
    return seen


def test_skipped_steps_are_counted_between_checkpoints() -> None:
    training = TrainingConfig(checkpoint_every=4, max_skipped_steps=2)
    seen = _run(0, 20, {1, 3, 5, 6, 8, 9, 11}, training)
    assert [count for _, count in seen[:11]] == [0, 1, 1, 2, 0, 1, 2, 2, 1, 2, 2]
    assert seen[-1] == (11, -1)  # the third of its interval


def test_a_resumed_run_stops_at_the_same_step() -> None:
    training = TrainingConfig(checkpoint_every=4, max_skipped_steps=2)
    bad = {1, 3, 5, 6, 8, 9, 11}
    straight = _run(0, 20, bad, training)
    for checkpoint in (4, 8):
        assert _run(checkpoint, 20, bad, training) == straight[checkpoint:]


def test_without_an_allowance_the_first_bad_step_stops_the_run() -> None:
    assert _run(0, 3, {1}, TrainingConfig()) == [(0, 0), (1, -1)]


def test_a_skipped_step_leaves_what_comes_after_as_it_was() -> None:
    """Skipping step 1 equals a run that never had it: weights, averages, optimiser state."""
    trainer, weight = make()
    other, expected = make()
    assert isinstance(trainer.objective, Linear)
    for step in range(4):
        trainer.objective.bad = {2: math.nan} if step == 1 else {}
        if step == 1:
            with pytest.raises(NonFiniteError) as caught:
                trainer.step(step, batches())
            assert caught.value.what.endswith("(prompt ids: id-2-0, id-2-1).")
            continue
        trainer.step(step, batches())
        other.step(step, batches())
    assert torch.equal(weight, expected)
    assert torch.equal(trainer.ema_parameters["weight"], other.ema_parameters["weight"])
    theirs = other.optimizers[0].state[expected]
    for key, value in trainer.optimizers[0].state[weight].items():
        assert torch.equal(value, theirs[key])


# -------------------------------------------------------------------------------------- optimisers


def test_parameter_groups_follow_the_schedule_at_their_own_scale() -> None:
    """AdamW with betas 0 moves every element by its rate; decay alone is what group b has."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        loss = a.sum() + b.sum()
        yield loss, True

    config = OptimizerConfig.model_validate(
        {"lr": 0.1, "betas": (0.0, 0.0), "warmup_steps": 2, "clip_norm": 1e9, "weight_decay": 0.5,
         "groups": [{"match": "layer.b", "lr_scale": 0.1, "weight_decay": 0.0}]}
    )  # fmt: skip
    parameters = {"layer.a": a, "layer.b": b}
    trainer = Trainer(
        SimpleNamespace(losses=losses),
        parameters,
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
        SingleStrategy(torch.device("cpu")),
        TrainingConfig(batch_size=2, micro_batch_size=2, optimizer=config),
        seed=0,
    )
    metrics = trainer.step(0, batches(1))
    assert metrics.lr == pytest.approx(0.05)
    torch.testing.assert_close(a.detach(), torch.full((4,), 1 - 0.05 * 0.5 - 0.05))
    torch.testing.assert_close(b.detach(), torch.full((4,), 1 - 0.005))
    trainer.step(1, batches(1))
    torch.testing.assert_close(b.detach(), torch.full((4,), 1 - 0.005 - 0.01))


class OneOf(SingleStrategy):
    """One of several workers, whose gradients nobody averages; counts backward passes."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world_size = rank, world_size
        self.passes: list[bool] = []

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.passes.append(last)
        super().backward(loss, last=last)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_mean_over_any_number_of_workers_is_one_workers_gradient(world_size: int) -> None:
    """In float64, and all workers make the same number of passes, the last one of them the last."""
    gradients, passes = [], []
    for rank in range(world_size):
        trainer, weight = make()
        weight.data = weight.data.double()
        trainer.strategy = strategy = OneOf(rank, world_size)
        trainer._accumulate(2, batches()[rank::world_size])
        assert weight.grad is not None
        gradients.append(weight.grad)
        passes.append(strategy.passes)
    mean = torch.stack(gradients).mean(0)
    rows, (_, weight) = data(2).double(), make()
    exact = weight.detach().double().requires_grad_()
    (rows @ exact - 1).square().mean().backward()
    torch.testing.assert_close(mean, exact.grad, rtol=1e-14, atol=0)
    assert passes == [passes[0]] * world_size
    assert passes[0] == [False] * (len(passes[0]) - 1) + [True]


def test_optimizer_of_finds_each_parameters_owner() -> None:
    trainer, weight = make()
    assert trainer.optimizer_of(weight) is trainer.optimizers[0]
    with pytest.raises(ValueError, match="not one of the trainer's"):
        trainer.optimizer_of(nn.Parameter(torch.zeros(5)))


def test_bad_input_says_what_was_expected() -> None:
    trainer, weight = make()
    with pytest.raises(ValueError, match="worker 0 of 1 has 4 of the 4 micro-batches, got 0"):
        trainer.step(0, [])
    with pytest.raises(ValueError, match="an average of every parameter.*layer.weight"):
        Trainer(
            trainer.objective,
            {"layer.weight": weight},
            {"weight": weight.detach().clone()},
            trainer.strategy,
            trainer.training,
            seed=0,
        )
