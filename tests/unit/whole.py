"""Whole tensors and whole checkpoints, in tests that compare what several processes did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from piflow.sharding import Strategy
from piflow.sharding.everyone import rank
from piflow.sharding.tensors import SplitTensor
from piflow.training.checkpoint import (
    STATE_FILE,
    RunState,
    gather_files,
    state_file,
    write_shards,
)
from piflow.training.snapshot import Snapshot
from piflow.training.step import Trainer


def whole(value: Tensor | SplitTensor) -> Tensor:
    """All of a tensor, however it is split; a collective."""
    if not isinstance(value, Tensor):
        return value.whole()
    detached = value.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def gather(strategy: Strategy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prepared parameters, or their gradients, whole on rank 0's CPU; an empty dict on others."""
    return _on_rank_0({name: strategy.saved_parameter(value) for name, value in tensors.items()})


def gather_saved(tensors: Mapping[str, Tensor | SplitTensor]) -> dict[str, Tensor]:
    """The same of what a strategy has for a checkpoint."""
    return _on_rank_0(tensors)


def save_checkpoint(folder: Path, trainer: Trainer, state: RunState) -> None:
    """Write a checkpoint and wait for it; every worker calls it with one shared folder."""
    files = gather_files(write_shards(folder, Snapshot(trainer).copy()), None)
    if rank() == 0:
        (folder / STATE_FILE).write_bytes(state_file(state, files))


def _on_rank_0(tensors: Mapping[str, Tensor | SplitTensor]) -> dict[str, Tensor]:
    gathered = {}
    for name, tensor in tensors.items():
        everything = whole(tensor)
        if rank() == 0:
            gathered[name] = everything.cpu().clone()
    return gathered
