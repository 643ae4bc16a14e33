"""Sharded checkpoints of a `Trainer`, restorable on another number of workers.

A checkpoint is a folder: the tensors in torch.distributed.checkpoint's format, every worker writing
its own shards, and `state.json`, written by rank 0, which also lists all workers' files and their
sizes. A folder is a checkpoint when `state.json` and every file that it lists are there, whole: the
workers' files reach the run's storage one by one, in any order, and any of them may be interrupted.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from piflow.optimizers import allocate_state, state_tensors
from piflow.step import Trainer

STATE_FILE = "state.json"
FILES_KEY = "files"  # in state.json: name -> bytes of every other file


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
    with _quiet():
        dcp.save(_tree(trainer), checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    files = _files_of_all_workers(folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        content = {**asdict(state), FILES_KEY: files}
        (folder / STATE_FILE).write_text(json.dumps(content, indent=1))


def load_state(folder: Path) -> RunState:
    """Read `state.json`.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a finished checkpoint: it has no {STATE_FILE}")
    try:
        content = json.loads(path.read_text())
        del content[FILES_KEY]
        return RunState(**content)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from error


def load_checkpoint(folder: Path, trainer: Trainer) -> RunState:
    """Restore parameters, EMA and optimiser in place; any number of workers.

    Raises:
        CheckpointError: files are damaged, a tensor is missing, or its shape is another one.
    """
    state = load_state(folder)
    stored = _stored(folder)
    _allocate_optimizer_state(trainer, stored)
    tree = _tree(trainer)
    problems = _mismatches(tree, stored)
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} doesn't fit this model: {'; '.join(problems[:5])}"
            f"{' …' if len(problems) > 5 else ''}. Resume with the recipe that wrote it"
        )
    _read(tree, folder, no_dist=not dist.is_initialized())
    return state


def load_tensors(folder: Path, section: str) -> dict[str, Tensor]:
    """One section ("trainable" or "ema") as whole tensors on the CPU, without a trainer.

    Raises:
        CheckpointError: the folder is no finished checkpoint, is damaged or lacks the section.
    """
    load_state(folder)
    stored = _stored(folder)
    prefix = f"{section}."
    tree = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not tree:
        raise CheckpointError(f"checkpoint {folder} has no section {section!r}")
    _read(tree, folder, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tree.items()}


def _files_of_all_workers(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files in every worker's folder."""
    mine = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != STATE_FILE}
    everyone = [mine]
    if dist.is_initialized():
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    return {name: size for part in everyone for name, size in sorted(part.items())}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _stored(folder: Path) -> dict[str, Any]:
    """What the checkpoint says it holds, by flat name."""
    try:
        return FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(folder, error) from error


def _read(tree: dict[str, Tensor], folder: Path, *, no_dist: bool) -> None:
    """Fill the tensors in place."""
    try:
        with _quiet():
            dcp.load(tree, checkpoint_id=str(folder), no_dist=no_dist)
    except CheckpointException as error:  # not an `Exception`: nobody else would catch it
        cause, _ = next(iter(error.failures.values()))
        raise _damaged(folder, cause) from error


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} is damaged ({type(error).__name__}: {error}); use another checkpoint"
    )


def _tree(trainer: Trainer) -> dict[str, Tensor]:
    """Flat names -> the trainer's own tensors (sharded where it is sharded)."""
    tree: dict[str, Tensor] = {}
    for name, parameter in trainer.parameters.items():
        tree[f"trainable.{name}"] = parameter.detach()
        for key, value in state_tensors(trainer.optimizer_of(parameter), parameter).items():
            tree[f"optimizer.{name}.{key}"] = value
    for name, tensor in trainer.ema_parameters.items():
        tree[f"ema.{name}"] = tensor.detach()
    return tree


def _allocate_optimizer_state(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Optimisers make their state in the first step; a resumed one needs it before that."""
    for name, parameter in trainer.parameters.items():
        prefix = f"optimizer.{name}."
        keys = [key.removeprefix(prefix) for key in stored if key.startswith(prefix)]
        allocate_state(trainer.optimizer_of(parameter), parameter, keys)


def _mismatches(tree: dict[str, Tensor], stored: dict[str, Any]) -> list[str]:
    problems = [f"it lacks {key}" for key in tree if key not in stored]
    problems += [f"it has an unknown {key}" for key in stored if key not in tree]
    problems += [
        f"{key} has shape {tuple(stored[key].size)}, expected {tuple(tensor.shape)}"
        for key, tensor in tree.items()
        if key in stored and stored[key].size != tensor.shape
    ]
    return problems
