"""Sharded checkpoints of a `Trainer`, restorable on another number of workers.

Also under another strategy: names, shapes and values are the same under all of them.

A checkpoint is a folder: the tensors in torch.distributed.checkpoint's format, every worker writing
its own shards; `metadata.json`, which says where in them each tensor lies (see
`piflow.training.checkpoint_layout`); and `state.json`, which rank 0 writes last. It lists bytes and
sha256 of every file and its own checksum: without it the folder is half written, with it every byte
is verified before anything is used. Nothing of it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from piflow import storage
from piflow.config import Recipe
from piflow.runs import folder as run_folder
from piflow.sharding.everyone import everyone, rank
from piflow.sharding.tensors import SplitTensor
from piflow.storage.foreign import ForeignDataError, parse_object, relative_name, shown
from piflow.training.checkpoint_layout import (
    LAYOUT_FILE,
    Layout,
    LayoutReader,
    LayoutWriter,
    read_layout,
)
from piflow.training.optimizer_state import allocate_state
from piflow.training.snapshot import saved_tensors
from piflow.training.step import Trainer

STATE_FILE = "state.json"
FILES_KEY = "files"  # in state.json: name -> bytes of every other file
SHA256_KEY = "sha256"  # name -> hex digest of every other file
CHECKSUM_KEY = "checksum"  # sha256 of state.json's other keys
_BATCH_BYTES = 2**28  # read at once of tensors that no worker holds whole
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RunState:
    """Where a run is. Randomness needs no state: it is a function of (seed, step, micro-batch)."""

    step: int  # optimiser steps done
    samples: int  # global sample offset in the stream
    recipe_hash: str
    mlflow_run_id: str | None
    recipe: dict[str, Any]  # the whole resolved recipe
    loss: float | None = None  # mean over the steps since the checkpoint before, but skipped ones
    identity: dict[str, Any] | None = None  # the recipe's; None in checkpoints of version 0.1.0
    manifest_hash: str | None = None  # of the store that gave the prompts; None in earlier ones


class CheckpointError(ValueError):
    """A checkpoint that can't be used; says what is wrong with which file."""


class DamagedCheckpointError(CheckpointError):
    """Bytes of a checkpoint are missing or not those that were written; another one may be good."""


class ForeignCheckpointError(CheckpointError):
    """A checkpoint of another recipe or store than those of this run."""


@dataclass(frozen=True)
class FileRecord:
    """What `state.json` says of a file."""

    size: int  # bytes
    sha256: str  # hex


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, FileRecord]:
    """Write this worker's shards; returns its own files by name.

    Every worker calls it with a folder: one that all share, or one a worker (the files then merge
    without clashes).

    Args:
        group: whom to agree with; in a thread beside training it must be a group of its own.
    """
    with _quiet():
        dcp.save(
            dict(tensors),
            storage_writer=LayoutWriter(str(folder)),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    me = rank()
    return {
        file.name: FileRecord(file.stat().st_size, storage.sha256(str(file)))
        for file in sorted(folder.iterdir())
        if file.name.startswith(f"__{me}_") or (me == 0 and file.name == LAYOUT_FILE)
    }


def gather_files(
    mine: Mapping[str, FileRecord], problem: str | None, group: dist.ProcessGroup | None = None
) -> dict[str, FileRecord]:
    """All workers' files. Every worker calls it when its own files are where they shall be.

    Args:
        problem: why they are not; it fails all workers, so that none waits for another.

    Raises:
        CheckpointError: a worker had a problem.
    """
    found = everyone((dict(mine), problem), group)
    problems = [f"worker {rank}: {text}" for rank, (_, text) in enumerate(found) if text]
    if problems:
        raise CheckpointError("; ".join(problems))
    return {name: record for part, _ in found for name, record in sorted(part.items())}


def state_file(state: RunState, files: Mapping[str, FileRecord]) -> bytes:
    """Content of `state.json`; with it the folder becomes a checkpoint."""
    content = {
        **asdict(state),
        FILES_KEY: {name: record.size for name, record in files.items()},
        SHA256_KEY: {name: record.sha256 for name, record in files.items()},
    }
    return json.dumps({**content, CHECKSUM_KEY: _checksum(content)}, indent=1).encode()


def load_state(folder: Path) -> RunState:
    """Read `state.json`.

    Raises:
        DamagedCheckpointError: it is missing, unreadable, or not what was written.
    """
    return _read_state(folder)[0]


def read_state(uri: str) -> RunState:
    """Read a checkpoint's `state.json` from wherever it is, and no other file.

    Raises:
        DamagedCheckpointError: it is unreadable, or not what was written.
        OSError: it can't be read.
    """
    return _parsed_state(storage.join(uri, STATE_FILE))[0]


def verify_checkpoint(folder: Path) -> RunState:
    """Read every byte and compare with what was written.

    Raises:
        DamagedCheckpointError: names the file, what was expected and what came.
    """
    return _verified(folder)[0]


def _verified(folder: Path) -> tuple[RunState, Layout]:
    """State and layout of a checkpoint of which every byte is as it was written."""
    state, files = _read_state(folder)
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise _damaged(folder, f"{name} is missing")
        size = file.stat().st_size
        if size != expected.size:
            raise _damaged(folder, f"{name} has {size} bytes, expected {expected.size}")
        sha256 = storage.sha256(str(file))
        if sha256 != expected.sha256:
            raise _damaged(
                folder, f"{name} has sha256 {sha256[:16]}, expected {expected.sha256[:16]}"
            )
    try:
        return state, read_layout(folder, {name: file.size for name, file in files.items()})
    except (OSError, ForeignDataError) as error:
        raise _damaged(folder, str(error)) from error


def require_same_run(
    state: RunState, recipe: Recipe, manifest_hash: str | None, where: str
) -> None:
    """Make sure that a checkpoint is of this recipe and store.

    Args:
        recipe: as it was written, its paths not made absolute.
        manifest_hash: of the run's embedding store; None: whatever it was.
        where: the checkpoint, for the message.

    Raises:
        ForeignCheckpointError: names the keys of the recipe that differ, where the checkpoint has
            them, or both stores.
    """
    if not recipe.is_run_of(state.recipe_hash, state.identity):
        changes = [] if state.identity is None else recipe.differences(state.identity)
        raise ForeignCheckpointError(
            f"checkpoint {where} was written by recipe {shown(state.recipe_hash)}, this one is "
            f"{recipe.hash()}; use the recipe that wrote it, or move the checkpoint away"
            + "".join(f"\n  {shown(change)}" for change in changes[:10])
        )
    if None not in (state.manifest_hash, manifest_hash) and state.manifest_hash != manifest_hash:
        raise ForeignCheckpointError(
            f"checkpoint {where} was trained on store {shown(state.manifest_hash, 16)}, this run's "
            f"is {shown(manifest_hash, 16)}: use the store that it was trained on, or move the "
            "checkpoint away"
        )


def require_step(state: RunState, step: int, where: str) -> None:
    """Make sure that a checkpoint is of the step that its folder is named after.

    Raises:
        ForeignCheckpointError: somebody renamed the folder, or copied another one there.
    """
    if state.step != step:
        raise ForeignCheckpointError(
            f"checkpoint {where} is of step {state.step}, its folder's name says {step}: somebody "
            "renamed it or copied another one there. Give it the name that it had "
            f"({run_folder.checkpoint_name(state.step)}), or move it away"
        )


def load_checkpoint(
    folder: Path, trainer: Trainer, require: Callable[[RunState], None] = lambda state: None
) -> RunState:
    """Verify, then restore parameters, EMA and optimiser in place; any number of workers.

    Every worker calls it and verifies the files that it reads; all of them fail together.

    Args:
        require: raises a CheckpointError unless the checkpoint is to be used; nothing has been
            restored then.

    Raises:
        DamagedCheckpointError: a file is missing, or not what was written, for any of the workers.
        CheckpointError: a tensor is missing, or its shape is another one.
    """
    state, stored = _verified_by_all(folder)
    require(state)
    _allocate_optimizer_state(trainer, stored)
    tree = _without_fresh_state(saved_tensors(trainer), stored)
    _require_fit(folder, tree, stored)
    no_dist = not dist.is_initialized()
    in_place = {name: tensor for name, tensor in tree.items() if isinstance(tensor, Tensor)}
    _read(in_place, folder, stored, no_dist=no_dist)
    for batch in _batches(tree):
        wholes = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in batch.items()}
        _read(wholes, folder, stored, no_dist=no_dist)
        for name, part in batch.items():
            part.fill(wholes[name])
    return state


class StoredSection:
    """One section ("trainable" or "ema") of a checkpoint; its tensors are read when asked for.

    Args:
        folder: is verified, every byte of it.

    Raises:
        DamagedCheckpointError: the folder is no finished checkpoint, or bytes are not as written.
        CheckpointError: it lacks the section.
    """

    def __init__(self, folder: Path, section: str) -> None:
        _, self._stored = _verified(folder)
        self._folder, self._prefix = folder, f"{section}."
        names = [name for name in self._stored if name.startswith(self._prefix)]
        if not names:
            raise CheckpointError(f"checkpoint {folder} has no section {section!r}")
        self.empty: dict[str, Tensor] = {
            name.removeprefix(self._prefix): self._like(name, "meta") for name in names
        }
        """By published name, on "meta": shapes and dtypes."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors on the CPU."""
        tree = {f"{self._prefix}{name}": self._like(f"{self._prefix}{name}") for name in names}
        _read(tree, self._folder, self._stored, no_dist=True)
        return {name.removeprefix(self._prefix): tensor for name, tensor in tree.items()}

    def _like(self, name: str, device: str = "cpu") -> Tensor:
        entry = self._stored[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device=device)


def load_tensors(folder: Path, section: str) -> dict[str, Tensor]:
    """All of a section as whole tensors on the CPU, without a trainer.

    Raises:
        DamagedCheckpointError, CheckpointError: as of `StoredSection`.
    """
    stored = StoredSection(folder, section)
    return stored.read(stored.empty)


def load_section(folder: Path, section: str, into: Mapping[str, Tensor]) -> RunState:
    """Verify, then read one section into tensors that are there, whole or sharded by torch.

    Every worker calls it; all of them fail together.

    Args:
        into: by published name.

    Raises:
        DamagedCheckpointError: a file is missing, or not what was written, for any of the workers.
        CheckpointError: a tensor is missing, or its shape is another one.
    """
    state, stored = _verified_by_all(folder)
    tree = {f"{section}.{name}": tensor.detach() for name, tensor in into.items()}
    there = {name: entry for name, entry in stored.items() if name.startswith(f"{section}.")}
    _require_fit(folder, tree, there)
    _read(tree, folder, stored, no_dist=not dist.is_initialized())
    return state


def _read_state(folder: Path) -> tuple[RunState, dict[str, FileRecord]]:
    """What `state.json` says, if it is what was written."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise DamagedCheckpointError(
            f"{folder} is not a finished checkpoint: it has no {STATE_FILE}; use another checkpoint"
        )
    return _parsed_state(str(path))


def _parsed_state(where: str) -> tuple[RunState, dict[str, FileRecord]]:
    """The same of the file at a URI."""
    try:
        content = parse_object(storage.read_bytes(where), where=where)
        checksum = content.pop(CHECKSUM_KEY)
        if checksum != _checksum(content):
            raise ValueError("its checksum is another one")
        files = _files(content.pop(FILES_KEY), content.pop(SHA256_KEY), where)
        return _run_state(content), files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{where} is damaged ({type(error).__name__}: {shown(error)}), or was written by an "
            "earlier version without checksums; use another checkpoint"
        ) from error


def _files(sizes: dict[str, Any], digests: dict[str, Any], where: str) -> dict[str, FileRecord]:
    """Records of a checkpoint's files, whose names stay in its folder."""
    files = {}
    for name, size in sizes.items():
        digest = digests[relative_name(name, where=where)]
        if type(size) is not int or size < 0:
            raise ValueError(f"{shown(name)} has {shown(repr(size))} for its bytes")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"{shown(name)} has {shown(repr(digest))} for its sha256")
        files[name] = FileRecord(size, digest)
    return files


def _run_state(content: dict[str, Any]) -> RunState:
    """The state, each value of its type."""
    state = RunState(**content)
    counts = (state.step, state.samples)
    texts = (state.recipe_hash, state.mlflow_run_id or "", state.manifest_hash or "")
    trees = (state.recipe, state.identity or {})
    if (
        any(type(count) is not int or count < 0 for count in counts)
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(tree, dict) for tree in trees)
        or not isinstance(state.loss, float | int | None)
    ):
        raise ValueError("a value has another type")
    return state


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verified_by_all(folder: Path) -> tuple[RunState, Layout]:
    """Every worker looks at what it is about to read; one's problem is all workers' problem."""
    found, problem = None, None
    try:
        found = _verified(folder)
    except DamagedCheckpointError as error:
        problem = str(error)
    first = next((text for text in everyone(problem) if text is not None), None)
    if found is None or first is not None:
        raise DamagedCheckpointError(first)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only, which is meant.

    Filters are the whole process's: nothing is touched where a thread beside training saves.
    """
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read(tree: dict[str, Tensor], folder: Path, stored: Layout, *, no_dist: bool) -> None:
    """Fill the tensors in place."""
    try:
        with _quiet():
            dcp.load(tree, storage_reader=LayoutReader(folder, stored), no_dist=no_dist)
    except CheckpointException as error:  # not an `Exception`: nobody else would catch it
        cause, _ = next(iter(error.failures.values()))
        raise _damaged(folder, f"{type(cause).__name__}: {cause}") from error


def _damaged(folder: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {folder} is damaged ({reason}); use another checkpoint"
    )


def _allocate_optimizer_state(trainer: Trainer, stored: Layout) -> None:
    """Optimisers make their state in the first step; a resumed one needs it before that."""
    for name, parameter in trainer.parameters.items():
        prefix = f"optimizer.{name}."
        keys = [key.removeprefix(prefix) for key in stored if key.startswith(prefix)]
        optimizer = trainer.optimizer_of(parameter)
        if trainer.strategy.split_state(optimizer, parameter) is None:
            allocate_state(optimizer, parameter, keys)


def _without_fresh_state(
    tree: dict[str, Tensor | SplitTensor], stored: Layout
) -> dict[str, Tensor | SplitTensor]:
    """Less the state, split otherwise, of parameters that were never moved when it was saved.

    torch's optimisers have none of these; what moves all parameters at once has zeros already.
    """
    return {
        name: tensor
        for name, tensor in tree.items()
        if name in stored or isinstance(tensor, Tensor) or not name.startswith("optimizer.")
    }


def _batches(tree: dict[str, Tensor | SplitTensor]) -> Iterator[dict[str, SplitTensor]]:
    """What is split otherwise than torch does, in groups of about `_BATCH_BYTES`."""
    batch: dict[str, SplitTensor] = {}
    size = 0
    for name, tensor in tree.items():
        if isinstance(tensor, Tensor):
            continue
        batch[name] = tensor
        size += tensor.shape.numel() * tensor.dtype.itemsize
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _require_fit(folder: Path, tree: Mapping[str, Tensor | SplitTensor], stored: Layout) -> None:
    """Refuses tensors that aren't exactly those that the checkpoint has."""
    problems = _mismatches(tree, stored)
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} doesn't fit this model: {'; '.join(problems[:5])}"
            f"{' …' if len(problems) > 5 else ''}. Use the recipe that wrote it"
        )


def _mismatches(tree: Mapping[str, Tensor | SplitTensor], stored: Layout) -> list[str]:
    problems = [f"it lacks {key}" for key in tree if key not in stored]
    problems += [f"it has an unknown {key}" for key in stored if key not in tree]
    problems += [
        f"{key} has shape {tuple(stored[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in tree.items()
        if key in stored and stored[key].shape != tensor.shape
    ]
    return problems
