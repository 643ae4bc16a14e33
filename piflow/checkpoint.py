"""Sharded checkpoints of a `Trainer`, restorable on another number of workers.

A checkpoint is a folder: the tensors in torch.distributed.checkpoint's format, every worker writing
its own shards, and `state.json`, written by rank 0 after the tensors. A folder without a valid
`state.json` is not a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from piflow.step import Trainer

STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run is. Randomness needs no state: it is a function of (seed, step, micro-batch)."""

    step: int  # optimiser steps done
    samples: int  # global sample offset in the stream
    recipe_hash: str
    mlflow_run_id: str | None
    recipe: dict[str, Any]  # the whole resolved recipe


class CheckpointError(ValueError):
    """A checkpoint that can't be used; says what is wrong with which file."""


def save_checkpoint(folder: Path, trainer: Trainer, state: RunState) -> None:
    """Write this worker's part. Every worker calls it with a folder; rank 0 adds `state.json`.

    The folders may be one shared folder or one a worker (their files then merge without clashes).
    """
    tree = _tree(trainer)
    dcp.save(tree, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1))


def load_state(folder: Path) -> RunState:
    """Read `state.json`.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a finished checkpoint: it has no {STATE_FILE}")
    try:
        return RunState(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from error


def load_checkpoint(folder: Path, trainer: Trainer) -> RunState:
    """Restore parameters, EMA and optimiser in place; any number of workers.

    Raises:
        CheckpointError: a tensor is missing, or its shape is another one.
    """
    state = load_state(folder)
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    _allocate_optimizer_state(trainer, stored)
    tree = _tree(trainer)
    problems = _mismatches(tree, stored)
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} doesn't fit this model: {'; '.join(problems[:5])}"
            f"{' …' if len(problems) > 5 else ''}. Resume with the recipe that wrote it"
        )
    dcp.load(tree, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    return state


def load_tensors(folder: Path, section: str) -> dict[str, Tensor]:
    """One section ("trainable" or "ema") as whole tensors on the CPU, without a trainer.

    Raises:
        CheckpointError: the folder is no finished checkpoint or lacks the section.
    """
    load_state(folder)
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    prefix = f"{section}."
    tree = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not tree:
        raise CheckpointError(f"checkpoint {folder} has no section {section!r}")
    dcp.load(tree, checkpoint_id=str(folder), no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tree.items()}


def _tree(trainer: Trainer) -> dict[str, Tensor]:
    """Flat names -> the trainer's own tensors (sharded where it is sharded)."""
    tree: dict[str, Tensor] = {}
    for name, parameter in trainer.parameters.items():
        tree[f"trainable.{name}"] = parameter.detach()
        for key, value in trainer.optimizer_of(parameter).state.get(parameter, {}).items():
            tree[f"optimizer.{name}.{key}"] = value
    for name, tensor in trainer.ema_parameters.items():
        tree[f"ema.{name}"] = tensor.detach()
    return tree


def _allocate_optimizer_state(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Optimisers make their state in the first step; a resumed one needs it before that."""
    for name, parameter in trainer.parameters.items():
        prefix = f"optimizer.{name}."
        trainer.optimizer_of(parameter).state[parameter] = {
            key.removeprefix(prefix): (
                torch.zeros_like(parameter, requires_grad=False)
                if entry.size == parameter.shape
                else torch.zeros(entry.size, dtype=entry.properties.dtype)
            )
            for key, entry in stored.items()
            if key.startswith(prefix)
        }


def _mismatches(tree: dict[str, Tensor], stored: dict[str, Any]) -> list[str]:
    problems = [f"it lacks {key}" for key in tree if key not in stored]
    problems += [f"it has an unknown {key}" for key in stored if key not in tree]
    problems += [
        f"{key} has shape {tuple(stored[key].size)}, expected {tuple(tensor.shape)}"
        for key, tensor in tree.items()
        if key in stored and stored[key].size != tensor.shape
    ]
    return problems
