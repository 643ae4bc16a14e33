"""One optimiser step: micro-batches -> loss -> backward -> clip -> optimiser -> EMA.

Runs without Ray: a bare machine with torch, diffusers and peft can call `Trainer.step` in a loop.
All randomness of a micro-batch comes from one generator seeded by (seed, step, micro-batch index).
So a run's results don't depend on the number of workers, and nothing about randomness has to be
saved: resuming at a step repeats exactly what an uninterrupted run does there.

Workers that compute a micro-batch together (`runtime.context_parallel`) form a group, which takes
the same micro-batches; else each is a group of its own. Every forward pass may be a collective, so
all workers make the same number of them. Where the groups don't divide the micro-batches of a step,
those with one fewer repeat their last one with weight zero.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from piflow.config import OptimizerConfig, TrainingConfig
from piflow.data.batch import MicroBatch
from piflow.ema import ema_beta, ema_update
from piflow.imitation import PartOfLoss
from piflow.sharding.base import Strategy
from piflow.sharding.everyone import everyone, sum_over_workers
from piflow.training.optimizers import build_optimizers, set_learning_rate

_ADVICE = (
    "Weights were not touched and the last checkpoint is good. Try a lower "
    "training.optimizer.lr, a longer warm-up, or check the store with `piflow embed --verify`; "
    "training.max_skipped_steps lets a run go on without such steps"
)


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is NaN or infinite; weights were not touched in this step.

    Args:
        what: step, loss, gradient norm and prompt ids.
        advice: what to do about it, if the run stops here.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what} {advice}".rstrip())
        self.what = what


class SkippedSteps:
    """Counts the steps that were skipped since the last multiple of `checkpoint_every`.

    A resumed run computes exactly those steps again, so its count is the uninterrupted run's and
    no checkpoint has to hold it; after a stop that saved in between, it counts from there. Every
    worker sees the same steps fail, and decides alike.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._steps: list[int] = []

    def count(self, step: int) -> int:
        """Steps skipped in the interval between checkpoints that `step` is in."""
        interval = step // self._training.checkpoint_every
        self._steps = [s for s in self._steps if s // self._training.checkpoint_every == interval]
        return len(self._steps)

    def skip(self, step: int, error: NonFiniteError) -> None:
        """Count one more.

        Raises:
            NonFiniteError: `error`, when `max_skipped_steps` were skipped before it.
        """
        if self.count(step) >= self._training.max_skipped_steps:
            raise error
        self._steps.append(step)


class Objective(Protocol):
    """A training objective on one micro-batch."""

    def losses(
        self, batch: MicroBatch, step: int, generator: torch.Generator
    ) -> Iterator[PartOfLoss]:
        """The loss in parts; each is back-propagated before the next is asked for.

        Yields:
            (a scalar with gradient, whether it is the micro-batch's last); their sum is the loss.
        """
        ...


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step reports, already averaged over the global batch."""

    step: int
    loss: float
    grad_norm: float
    lr: float  # the schedule's; a parameter group has it times its lr_scale
    # wall time after the gradients were there: clipping, optimiser, EMA
    update_seconds: float = field(default=0.0, compare=False)


def micro_batch_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The CPU generator of one micro-batch, the same whichever worker runs it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `decay_fraction` of the run."""
    warmup, start = min(1.0, (step + 1) / max(1, config.warmup_steps)), config.warmup_start
    if start is not None and config.warmup_steps:
        warmup = min(1.0, start + (1 - start) * step / config.warmup_steps)
    decay_steps = config.decay_fraction * steps
    decay = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return config.lr * warmup * max(0.0, decay)


class Trainer:
    """Owns the optimiser and applies objectives; knows nothing of data, files or clusters.

    Args:
        parameters: the trainable parameters by name.
        ema_parameters: their averages, by the same names; updated in place.
        strategy: how gradients are reduced over the workers.
        training: batch, optimiser and averaging.
        seed: of the micro-batches' generators.
        context_parallel: neighbouring workers that form a group.

    Raises:
        ValueError: a parameter has no average, or an optimiser group fits no parameter.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        ema_parameters: Mapping[str, Tensor],
        strategy: Strategy,
        training: TrainingConfig,
        seed: int,
        *,
        context_parallel: int = 1,
    ) -> None:
        missing = [name for name in parameters if name not in ema_parameters]
        if missing:
            raise ValueError(
                f"expected an average of every parameter, {len(missing)} have none, first "
                f"{', '.join(missing[:3])}; pass ema_parameters with the parameters' names"
            )
        self.objective = objective
        self.parameters = dict(parameters)
        self.ema_parameters = {name: ema_parameters[name] for name in parameters}
        self.strategy = strategy
        self.training = training
        self.seed = seed
        self.context_parallel = context_parallel
        self._before_update: list[Callable[[], None]] = []
        self.groups = strategy.world_size // context_parallel
        self.optimizers = build_optimizers(parameters, training.optimizer)
        self._owners = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        strategy.adopt(self.optimizers)  # may put others in the groups' place
        self.num_micro_batches = training.batch_size // training.micro_batch_size

    @property
    def trained(self) -> int:
        """Values that the optimiser moves, over all workers."""
        parts = map(self.strategy.part, self.parameters.values())
        return sum(math.prod(part.shape) for part in parts)

    def step(self, step: int, micro_batches: Sequence[MicroBatch]) -> StepMetrics:
        """Run optimiser step `step` (counted from 0) on this worker's micro-batches.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite; names the prompts.
            ValueError: these aren't as many as this worker's share.
        """
        self._require_share(step, micro_batches)
        for parameter in self.parameters.values():
            parameter.grad = None
        loss, suspects = self._accumulate(step, micro_batches)  # waits for the device
        began = time.perf_counter()
        config = self.training.optimizer
        max_norm = config.clip_norm if step >= config.warmup_steps else math.inf
        lr = learning_rate(step, self.training.steps, config)
        set_learning_rate(self.optimizers, lr)
        while self._before_update:
            self._before_update.pop()()
        # a loss that isn't finite has no finite gradient: then nothing moves
        grad_norm = self.strategy.update(list(self.parameters.values()), self.optimizers, max_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            if math.isfinite(loss):  # an overflow in the backward pass: any of them
                suspects = [prompt_id for batch in micro_batches for prompt_id in batch.prompt_ids]
            raise NonFiniteError(_what_is_not_finite(step, loss, grad_norm, suspects), _ADVICE)
        self._update_ema(step)
        return StepMetrics(step, loss, grad_norm, lr, time.perf_counter() - began)

    def before_update(self, call: Callable[[], None]) -> None:
        """Has the next update of the weights wait until `call` returns; it is called once."""
        self._before_update.append(call)

    def optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The optimiser that moves a parameter."""
        if parameter not in self._owners:
            raise ValueError("this parameter is not one of the trainer's")
        return self._owners[parameter]

    def _require_share(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Refuses another number of micro-batches than this worker's."""
        rank, world_size = self.strategy.rank, self.strategy.world_size
        group = rank // self.context_parallel
        share = len(range(group, self.num_micro_batches, self.groups))
        if not share or len(micro_batches) != share:
            raise ValueError(
                f"step {step}: worker {rank} of {world_size} has {share} of the "
                f"{self.num_micro_batches} micro-batches, got {len(micro_batches)}; use at most "
                f"{self.num_micro_batches * self.context_parallel} workers"
            )

    def _accumulate(
        self, step: int, micro_batches: Sequence[MicroBatch]
    ) -> tuple[float, list[str]]:
        """Gradients of the mean loss over the global batch.

        Returns:
            that loss, and the prompt ids of this worker's micro-batches whose loss is not finite.
        """
        losses = []
        passes = math.ceil(self.num_micro_batches / self.groups)
        padded = [*micro_batches, *[micro_batches[-1]] * (passes - len(micro_batches))]
        for position, batch in enumerate(padded):
            counts = position < len(micro_batches)
            # of the sum over the workers, which the strategy divides by their number; a group's
            # workers have their own tokens' part of the gradient each
            weight = self.strategy.world_size / self.num_micro_batches if counts else 0.0
            generator = micro_batch_generator(self.seed, step, batch.index)
            torch.manual_seed(generator.initial_seed())  # LoRA dropout draws from the global one
            total = torch.zeros((), device=self.strategy.device, dtype=torch.float64)
            for loss, last in self.objective.losses(batch, step, generator):
                total += loss.detach()
                self.strategy.backward(_or_nan(loss) * weight, last=last and position == passes - 1)
                del loss  # its graph must be gone before the next part's network call
            if counts:
                losses.append(total)
        samples = self.num_micro_batches * self.context_parallel
        mean = float(sum_over_workers(torch.stack(losses).sum())) / samples
        if math.isfinite(mean):  # finite losses have a finite sum: nothing more is asked of the GPU
            return mean, []
        suspects = [
            prompt_id
            for batch, finite in zip(
                micro_batches, torch.stack(losses).isfinite().tolist(), strict=True
            )
            if not finite
            for prompt_id in batch.prompt_ids
        ]
        return mean, suspects

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        ema = [self.strategy.local(tensor) for tensor in self.ema_parameters.values()]
        source = [self.strategy.local(parameter) for parameter in self.parameters.values()]
        config = self.training.ema
        beta = ema_beta(step, start=config.start, gamma=config.gamma, beta=config.beta)
        ema_update(ema, source, beta)


def _or_nan(loss: Tensor) -> Tensor:
    """The loss; one that isn't finite with a gradient of NaN, whatever its gradient would be.

    So the gradient norm, which all workers know before anything moves, tells of both.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _what_is_not_finite(step: int, loss: float, grad_norm: float, suspects: list[str]) -> str:
    """Every worker calls this: the suspects of all of them are gathered."""
    # a group's workers name the same ones
    prompt_ids = dict.fromkeys(prompt_id for part in everyone(suspects) for prompt_id in part)
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}, expected finite numbers "
        f"(prompt ids: {', '.join(prompt_ids)})."
    )
