"""A short training over workers that don't divide its micro-batches; run as a script, once a rank.

`uneven_workers.py FOLDER RANK WORLD_SIZE` trains under each strategy; rank 0 writes
FOLDER/results.pt. Imported by the test for one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import resharded_training as resharded
import torch
import torch.distributed as dist

from piflow.sharding import Strategy

MICRO_BATCHES = 4
STEPS = 5
STRATEGIES = ("fsdp", "ddp", "zero2", "zero3")


def trained(strategy: Strategy) -> dict[str, Any]:
    """Losses of the steps, and weights, averages and moments after them."""
    resharded.MICRO_BATCHES = MICRO_BATCHES
    trainer = resharded.make("adamw", strategy)
    losses = resharded.train(trainer, 0, STEPS)
    return {"losses": losses, "state": resharded.whole_state(trainer)}


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    results = {name: trained(resharded.strategy_named(name, world_size)) for name in STRATEGIES}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
