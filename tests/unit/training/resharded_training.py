"""Short trainings that are saved by one number of processes and strategy and resumed by another.

Imported by the test for one process, and run as a script, once a rank, for several:
`resharded_training.py FOLDER RANK WORLD_SIZE` resumes FOLDER/one under each strategy, saves
FOLDER/many, resumes that under each strategy again, and writes FOLDER/results.pt on rank 0.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.config import DeepSpeedConfig, EMAConfig, OptimizerConfig, TrainingConfig
from piflow.imitation import PartOfLoss
from piflow.sharding import Strategy, build_strategy
from piflow.sharding.tensors import SplitTensor
from piflow.training.checkpoint import RunState, load_checkpoint
from piflow.training.optimizer_state import saved_state
from piflow.training.step import NonFiniteError, Trainer
from tests.unit.whole import gather_saved, save_checkpoint

KINDS = ("adamw", "adamw8bit")
STRATEGIES = {  # name -> strategy, ZeRO stage, what DeepSpeed offloads
    "fsdp": ("fsdp", None, "none"),
    "ddp": ("ddp", None, "none"),
    "zero1": ("deepspeed", 1, "none"),
    "zero2": ("deepspeed", 2, "cpu"),
    "zero3": ("deepspeed", 3, "none"),
}
SAVED, END = 3, 5  # steps done at the checkpoint, and at the end
BAD_STEP = 99  # its loss isn't finite, its gradient is
MICRO_BATCHES = 2


class Rows:
    """A micro-batch of four random rows."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.prompts = self.prompt_ids = tuple(f"{index}.{row}" for row in range(4))


class Network(nn.Module):
    """Shards of unequal size (129 rows), one worker without a row, and a small tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven = nn.Linear(64, 129)
        self.single_row = nn.Linear(4096, 1)
        self.small = nn.Linear(129, 8)

    def forward(self, rows: Tensor) -> Tensor:
        return self.small(self.uneven(rows).tanh()) + self.single_row(rows.repeat(1, 64))


def make(kind: str, strategy: Strategy) -> Trainer:
    torch.manual_seed(0)
    network = Network()
    average = Network()
    average.load_state_dict(network.state_dict())
    average.requires_grad_(False)
    for module in (network, average):
        strategy.prepare(module, ())

    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        loss = (network(torch.randn(4, 64, generator=generator)) - 1).square().mean()
        if step == BAD_STEP and batch.index == 0:
            loss = loss + math.nan
        yield loss, True

    training = TrainingConfig(
        batch_size=4 * MICRO_BATCHES,
        micro_batch_size=4,
        optimizer=OptimizerConfig.model_validate({"type": kind, "lr": 1e-2, "warmup_steps": 2}),
        ema=EMAConfig(start=1),
    )
    return Trainer(
        SimpleNamespace(losses=losses),
        dict(network.named_parameters()),
        dict(average.named_parameters()),
        strategy,
        training,
        seed=0,
    )


def train(trainer: Trainer, start: int, end: int) -> list[float]:
    """Losses of steps `start` to `end` over this process's micro-batches of each global batch."""
    rank, world_size = trainer.strategy.rank, trainer.strategy.world_size
    mine = [Rows(index) for index in range(rank, MICRO_BATCHES, world_size)]
    return [trainer.step(step, mine).loss for step in range(start, end)]


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and optimiser state as whole tensors, on rank 0."""
    strategy = trainer.strategy
    tensors: dict[str, Tensor | SplitTensor] = {}
    for name, parameter in trainer.parameters.items():
        tensors[f"weight {name}"] = strategy.saved_parameter(parameter)
        tensors[f"ema {name}"] = strategy.saved_parameter(trainer.ema_parameters[name])
        state = saved_state(strategy, trainer.optimizer_of(parameter), parameter)
        for key, value in state.items():
            tensors[f"{key} {name}"] = value
    return gather_saved(tensors)


def strategy_named(name: str, world_size: int) -> Strategy:
    kind, stage, offload = STRATEGIES[name]
    options = None
    if stage is not None:
        options = DeepSpeedConfig.model_validate({"stage": stage, "offload_optimizer": offload})
    return build_strategy(kind, world_size, torch.device("cpu"), deepspeed=options)


def resumed_from(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint restores, what a step that fails leaves of it, and the next step's loss."""
    load_checkpoint(folder, trainer)
    restored = whole_state(trainer)
    with contextlib.suppress(NonFiniteError):
        train(trainer, BAD_STEP, BAD_STEP + 1)
        raise AssertionError(f"step {BAD_STEP} must fail")
    untouched = whole_state(trainer)
    losses = train(trainer, END, END + 1)
    return {"restored": restored, "untouched": untouched, "losses": losses}


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    results: dict[Any, Any] = {}
    trainers = {name: make("adamw", strategy_named(name, world_size)) for name in STRATEGIES}
    trainers["adamw8bit"] = make("adamw8bit", strategy_named("fsdp", world_size))
    for name, trainer in trainers.items():
        source = "adamw8bit" if name == "adamw8bit" else "adamw"
        load_checkpoint(folder / "one" / source, trainer)
        restored = whole_state(trainer)
        losses = train(trainer, SAVED, END)
        save_checkpoint(folder / "many" / name, trainer, RunState(END, 0, "", None, {}))
        results[name] = {"restored": restored, "losses": losses, "saved": whole_state(trainer)}
    for before in STRATEGIES:
        for after in STRATEGIES:
            results[before, after] = resumed_from(folder / "many" / before, trainers[after])
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
