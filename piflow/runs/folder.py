"""The run's folder: which recipe it belongs to, its MLflow run, its checkpoints.

RUN_DIR/run.json              recipe identity, MLflow run id
RUN_DIR/driver.json           the driver that writes here, see `piflow.runs.lease`
RUN_DIR/checkpoints/step_*    checkpoints; one without state.json is half written
RUN_DIR/starts/*.json         every start of its workers, see `piflow.runs.starts`
RUN_DIR/plan/                 what was predicted and measured, see `piflow.runs.predicted`
RUN_DIR/adapter, report       what export and evaluate write
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from piflow import storage
from piflow.config import Recipe
from piflow.storage import conditional
from piflow.storage.foreign import ForeignDataError, parse_object, shown

RECORD_FILE = "run.json"
CHECKPOINTS = "checkpoints"
_STATE_FILE = "state.json"  # of `piflow.training.checkpoint`, which needs torch
_CHECKPOINT_NAME = re.compile(r"step_\d+")
_WRITTEN = re.compile(r"state\.json|metadata\.json|\.metadata(\.tmp)?|__\d+_\d+\.distcp")

_Text = Annotated[str, Field(max_length=4096)]


class RunDirectoryError(ValueError):
    """The run directory can't be used for this recipe."""


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class RunRecord:
    """What `run.json` says, each value of its type: whoever may write the folder wrote it."""

    recipe_hash: _Text
    identity: dict[str, Any]
    tracking_uri: _Text  # nobody connects to it by this word alone: `piflow.runs.tracking.place_of`
    mlflow_run_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z_.-]+$", max_length=256)]
    manifest_hash: _Text  # of the embedding store: the order of prompts depends on it
    base_sha256: _Text | None = None  # the base's `weights_fingerprint`; None: not known
    # of a base on a hub: which the run goes on with
    base_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,64}$")] | None = None
    base_files: dict[str, _Text] | None = None  # file -> sha256 of all its bytes, where known


def read_record(run_dir: str) -> RunRecord | None:
    """The run's record, or None if no run was started here.

    Raises:
        RunDirectoryError: `run.json` is damaged.
    """
    uri = storage.join(run_dir, RECORD_FILE)
    if not storage.exists(uri):
        return None
    try:
        return RunRecord(**parse_object(storage.read_bytes(uri), where=uri))
    except (ForeignDataError, ValidationError) as error:
        raise RunDirectoryError(
            f"{uri} is damaged ({_first_problem(error)}); restore it, or start afresh with another "
            "run_dir"
        ) from error


def _first_problem(error: ForeignDataError | ValidationError) -> str:
    if isinstance(error, ForeignDataError):
        return str(error)
    problem = error.errors()[0]
    return f"{shown('.'.join(map(str, problem['loc'])))}: {shown(problem['msg'])}"


def write_record(run_dir: str, record: RunRecord) -> None:
    """Write `run.json` whole."""
    content = json.dumps(asdict(record), indent=1)
    storage.write_bytes(storage.join(run_dir, RECORD_FILE), content.encode())


def require_same_recipe(recipe: Recipe) -> RunRecord | None:
    """The record of the run to resume, or None for a new run.

    Raises:
        RunDirectoryError: the folder belongs to another recipe; names the keys that differ.
    """
    record = read_record(recipe.run_dir)
    if record is None or recipe.is_run_of(record.recipe_hash, record.identity):
        return record
    changes = recipe.differences(record.identity)
    raise RunDirectoryError(
        f"run directory {recipe.run_dir} belongs to another recipe "
        f"({record.recipe_hash}, this one is {recipe.hash()}):\n  "
        + "\n  ".join(changes[:10])
        + "\nGo on with the old values, or set another run_dir"
    )


def require_same_store(recipe: Recipe, record: RunRecord | None, manifest_hash: str) -> None:
    """Make sure that a run goes on with the store it was started on.

    Raises:
        RunDirectoryError: the store's content changed, and with it the order of prompts.
    """
    if record is not None and record.manifest_hash != manifest_hash:
        raise RunDirectoryError(
            f"run {recipe.run_dir} was started on store {record.manifest_hash[:16]}, "
            f"{recipe.embed.store} is {manifest_hash[:16]}: prompts would come in another order. "
            "Restore the store, or set another run_dir"
        )


def require_same_base(
    recipe: Recipe,
    record: RunRecord | None,
    base_sha256: str | None,
    base_files: dict[str, str] | None = None,
) -> None:
    """Make sure that a run goes on with the base weights that it was started with.

    Args:
        base_sha256: `weights_fingerprint` of what lies there now; None: not known.
        base_files: sha256 of all bytes of its files; None: not known.

    Raises:
        RunDirectoryError: the weights were replaced.
    """
    if record is None:
        return
    known = record.base_sha256
    if known is not None and base_sha256 is not None and known != base_sha256:
        raise RunDirectoryError(
            f"run {recipe.run_dir} was started with base weights {known[:16]}, those in "
            f"{recipe.model.path} are {base_sha256[:16]} now: they were replaced. Restore them, or "
            "set another run_dir"
        )
    if record.base_files is not None and base_files is not None:
        _require_same_bytes(recipe, record.base_files, base_files)


def _require_same_bytes(recipe: Recipe, known: dict[str, str], found: dict[str, str]) -> None:
    """Copies in other files have other hashes: only files of the same names are compared."""
    for name in sorted(known.keys() & found.keys()):
        if known[name] != found[name]:
            raise RunDirectoryError(
                f"run {recipe.run_dir} was started with another {name} (sha256 {known[name][:16]}, "
                f"now {found[name][:16]} in {recipe.model.path}): some of its bytes were changed. "
                "Restore it, or set another run_dir"
            )


def require_run(recipe: Recipe) -> RunRecord:
    """The record of a run that was started.

    Raises:
        RunDirectoryError: there is none, or it belongs to another recipe.
    """
    record = require_same_recipe(recipe)
    if record is None:
        raise RunDirectoryError(
            f"no run in {recipe.run_dir}; start it with `piflow distill`, or set run_dir"
        )
    return record


def checkpoints(run_dir: str) -> dict[int, str]:
    """Step -> URI of every finished checkpoint, oldest first."""
    return {
        step: uri for step, (uri, files) in _folders(run_dir).items() if _is_finished(uri, files)
    }


def sealed_checkpoints(run_dir: str) -> dict[int, str]:
    """Step -> URI of every checkpoint that was finished once, damaged ones too, oldest first."""
    return {step: uri for step, (uri, files) in _folders(run_dir).items() if _STATE_FILE in files}


def delete_half_written(run_dir: str) -> list[int]:
    """Delete what a killed save or a killed deletion left; returns the steps.

    No save may be running. Checkpoints that were finished once are left alone. On an object store
    uploads that were not finished go as well.
    """
    root = storage.join(run_dir, CHECKPOINTS)
    if storage.on_objects(root):
        conditional.abort_uploads(root)
    left = {
        step: uri for step, (uri, files) in _folders(run_dir).items() if _STATE_FILE not in files
    }
    for uri in left.values():
        delete_checkpoint(uri)
    return list(left)


def delete_checkpoint(uri: str) -> None:
    """Delete a checkpoint, if it is there: first it stops being one, then its files go.

    A link in its place goes without what it points to, and files of other names than a
    checkpoint's stay.
    """
    if storage.scheme(uri) == "file" and Path(storage.filesystem(uri)[1]).is_symlink():
        storage.delete_folder(uri)
        return
    storage.delete_file(storage.join(uri, _STATE_FILE))
    names = storage.list_files(uri)
    written = [name for name in names if _WRITTEN.fullmatch(name)]
    if written == names:
        storage.delete_folder(uri)
        return
    for name in written:
        storage.delete_file(storage.join(uri, name))


def delete_old_checkpoints(
    run_dir: str, keep_last: int, keep_every: int | None = None, keep_best: int = 0
) -> list[int]:
    """Delete finished checkpoints that retention doesn't keep; returns their steps.

    Args:
        keep_last: how many of the newest stay.
        keep_every: those of steps that it divides stay for good; None: no others stay.
        keep_best: how many of those with the lowest loss stay.
    """
    found = checkpoints(run_dir)
    best = _best(found, keep_best)
    old = [
        step
        for step in sorted(found)[:-keep_last]
        if step not in best and (keep_every is None or step % keep_every != 0)
    ]
    for step in old:
        delete_checkpoint(found[step])
    return old


def _best(found: dict[int, str], count: int) -> set[int]:
    """Steps of the checkpoints with the lowest loss, as their `state.json` says; the earlier first.

    So a run that was started again, elsewhere or by another driver, goes on with the same choice.
    """
    if not count:
        return set()
    losses = [(_state(uri).get("loss"), step) for step, uri in found.items()]
    known = [(loss, step) for loss, step in losses if type(loss) in (int, float) and loss == loss]
    return {step for _, step in sorted(known)[:count]}


def _state(uri: str) -> dict[str, Any]:
    """What a checkpoint's `state.json` says, unverified.

    Raises:
        ValueError: it isn't JSON, or no object.
        FileNotFoundError: it has none.
    """
    place = storage.join(uri, _STATE_FILE)
    return parse_object(storage.read_bytes(place), where=place)


def _folders(run_dir: str) -> dict[int, tuple[str, dict[str, int]]]:
    """Step -> URI of the folder and its files' bytes by name, oldest first."""
    root = storage.join(run_dir, CHECKPOINTS)
    folders: dict[str, dict[str, int]] = {}
    for path, size in storage.file_sizes(root).items():
        name, _, file = path.partition("/")
        if _CHECKPOINT_NAME.fullmatch(name) and file:
            folders.setdefault(name, {})[file] = size
    return {
        int(name.removeprefix("step_")): (storage.join(root, name), files)
        for name, files in sorted(folders.items())
    }


def _is_finished(uri: str, files: dict[str, int]) -> bool:
    """Whether the checkpoint's own list of files, written by rank 0, is there in full."""
    if _STATE_FILE not in files:
        return False
    try:
        expected = _state(uri)["files"]
    except (ValueError, KeyError, FileNotFoundError):
        return False  # half written, or deleted meanwhile
    return isinstance(expected, dict) and all(
        files.get(name) == size for name, size in expected.items()
    )


def newest_checkpoint(run_dir: str) -> str:
    """URI of the newest finished checkpoint.

    Raises:
        RunDirectoryError: there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise RunDirectoryError(
            f"no finished checkpoint in {run_dir}; run `piflow distill` first, or name one with "
            "--checkpoint"
        )
    return found[max(found)]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimiser steps."""
    return f"step_{step:08d}"


def checkpoint_uri(run_dir: str, step: int) -> str:
    """Where the checkpoint after `step` optimiser steps is, or will be."""
    return storage.join(run_dir, CHECKPOINTS, checkpoint_name(step))
