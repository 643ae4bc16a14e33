"""Short trainings that are saved by one number of processes and resumed by another.

Imported by the test for one process, and run as a script, once a rank, for several:
`resharded_training.py FOLDER RANK WORLD_SIZE` resumes FOLDER/one, saves FOLDER/many, and writes
FOLDER/results.pt on rank 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.checkpoint import RunState, load_checkpoint, save_checkpoint
from piflow.config import EMAConfig, OptimizerConfig, TrainingConfig
from piflow.optimizers import state_tensors
from piflow.sharding import Strategy, build_strategy
from piflow.step import Backward, Trainer

KINDS = ("adamw", "adamw8bit")
SAVED, END = 3, 5  # steps done at the checkpoint, and at the end
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

    def objective(batch: Rows, step: int, generator: torch.Generator, backward: Backward) -> Tensor:
        loss = (network(torch.randn(4, 64, generator=generator)) - 1).square().mean()
        backward(loss, True)
        return loss.detach()

    training = TrainingConfig(
        batch_size=4 * MICRO_BATCHES,
        micro_batch_size=4,
        optimizer=OptimizerConfig.model_validate({"type": kind, "lr": 1e-2, "warmup_steps": 2}),
        ema=EMAConfig(start=1),
    )
    return Trainer(
        objective,
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
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.parameters.items():
        tensors[f"weight {name}"] = parameter
        tensors[f"ema {name}"] = trainer.ema_parameters[name]
        for key, value in state_tensors(trainer.optimizer_of(parameter), parameter).items():
            tensors[f"{key} {name}"] = value
    return trainer.strategy.gather(tensors)


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    results = {}
    for kind in KINDS:
        strategy = build_strategy("fsdp", world_size, torch.device("cpu"))
        resumed = make(kind, strategy)
        load_checkpoint(folder / "one" / kind, resumed)
        restored = whole_state(resumed)
        losses = train(resumed, SAVED, END)
        save_checkpoint(folder / "many" / kind, resumed, RunState(END, 0, "", None, {}))
        results[kind] = {"restored": restored, "losses": losses, "saved": whole_state(resumed)}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
