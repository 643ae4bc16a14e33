"""Ray's life cycle and a run's: checks first, then the MLflow run, then Ray Train's workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from piflow import storage
from piflow.config import Recipe
from piflow.runs import folder as run_folder
from piflow.runs import origin, tracking
from piflow.runs.folder import RunRecord
from piflow.runs.lease import PROCESS, Ownership, RunTakenError, owned
from piflow.runs.tracking import MlflowTracker, RunStatus, Tracker, deliver_kept, finish
from piflow.runtime.attempts import Work, done_by_attempts
from piflow.runtime.predicting import predicting
from piflow.runtime.progress import mailbox_with_bar
from piflow.runtime.ray_job import grace_told, submission_id
from piflow.runtime.signals import Signals, StoppedError
from piflow.runtime.workers import session_with_room
from piflow.training.preflight import Run, preflight, require_newest_of


def train(recipe: Recipe, *, show_progress: bool = True) -> int:
    """Start the recipe's run, or go on with it from its newest checkpoint.

    Returns:
        The number of optimiser steps done.

    Raises:
        ValueError: the run directory belongs to another recipe or store, or store, model and recipe
            don't fit one another; or another driver is at it.
        NonFiniteError: the loss went NaN or infinite; the newest checkpoint is good.
        WorkersFailedError: the workers failed more often than `runtime.max_failures` allows.
        RayLostError: Ray itself ended; the newest checkpoint is good.
        StoppedError: a signal ended it before the last step.
    """
    run = preflight(recipe)  # a command that is refused leaves nothing behind
    with owned(recipe.run_dir) as ownership:
        run = _unchanged(run)
        record = run.record
        if record is not None and run.steps_done >= recipe.training.steps:
            uri, run_id = tracking.place_of(recipe, record), record.mlflow_run_id
            _tell_undelivered(deliver_kept(uri, run_id, recipe.run_dir))
            _end_dead_run(uri, run_id, recipe.run_dir)
            print(
                f"{recipe.name}: all {recipe.training.steps} steps are done; raise training.steps "
                "to go on"
            )
            return run.steps_done
        grace = grace_told()
        if grace is not None:
            print(grace, flush=True)
        with (
            _tracked(run) as (record, tracker),
            session_with_room(recipe),
            mailbox_with_bar(
                f"{recipe.name}: steps",
                recipe.training.steps,
                show=show_progress,
                run=recipe.name,
            ) as mailbox,
            Signals().handled() as signals,
        ):
            work = _training(run, record, ownership)
            with predicting(run.absolute.run_dir, tracker, partial(_note, run)) as figures:
                return done_by_attempts(replace(work, figures=figures), mailbox, signals, tracker)


def _training(run: Run, record: RunRecord, ownership: Ownership) -> Work:
    """What the workers are to do; they take the run's opened store from Ray's object store."""
    import ray

    from piflow.runtime.worker import train_worker

    recipe = run.absolute
    config: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "written": run.recipe.model_dump(mode="json"),
        "manifest_hash": record.manifest_hash,
        "tracking_uri": record.tracking_uri,
        "run_id": record.mlflow_run_id,
        "store": ray.put(run.store),
        "owner": PROCESS,
    }
    return Work(
        train_worker,
        config,
        recipe.runtime,
        recipe.training.steps,
        lambda step: f"step {step} is saved",
        ownership.require,
    )


def _note(run: Run, plan: str = "") -> str:
    """The MLflow run's description, before an evaluation."""
    return origin.description(run.recipe, run.store.manifest_hash, submission_id(), plan=plan)


def _end_dead_run(uri: str, run_id: str, run_dir: str) -> None:
    """A run with all its steps is finished, whatever its driver's end was taken for.

    Left by a driver that was killed after the last checkpoint (RUNNING), or that gave the cluster's
    head up while the workers went on to the end (FAILED).
    """
    if tracking.is_unfinished(uri, run_id):
        _tell_undelivered(finish(uri, run_id, run_dir, "FINISHED"))


def _unchanged(run: Run) -> Run:
    """The run as its owner finds it: another driver may have been at it during the checks.

    Raises:
        RunDirectoryError: another driver started it meanwhile, with another recipe or store.
    """
    record = run_folder.require_same_recipe(run.recipe)
    run_folder.require_same_store(run.recipe, record, run.store.manifest_hash)
    run_folder.require_same_base(run.recipe, record, run.base_sha256, run.base_files)
    found = run_folder.checkpoints(run.recipe.run_dir)
    require_newest_of(run.recipe, run.store.manifest_hash, found)
    return replace(run, record=record, checkpoints=found)


@contextmanager
def _tracked(run: Run) -> Iterator[tuple[RunRecord, Tracker]]:
    """The run in MLflow and in its record, started or resumed; MLflow is told how the block ends.

    What MLflow doesn't take is kept in the run's folder, for whoever comes next.
    """
    record = _recorded(run)
    recipe, uri, run_id = run.absolute, record.tracking_uri, record.mlflow_run_id
    tracker = MlflowTracker(uri, run_id, recipe.run_dir)
    buckets = [[item.height, item.width, item.rows] for item in run.store.layout.buckets]
    rows = sum(count for *_, count in buckets)
    tracker.log_dataset(
        storage.base_name(run.store.uri),
        run.store.uri,
        run.store.manifest_hash,
        "training",
        {"rows": rows, "buckets (height, width, rows)": buckets},
    )
    status: RunStatus | None = "FAILED"
    try:
        yield record, tracker
        status = "FINISHED"
    except StoppedError:
        status = "KILLED"
        raise
    except RunTakenError:
        status = None  # the run goes on under its new owner
        raise
    finally:
        tracker.close()
        if status is not None:
            _tell_undelivered(finish(uri, run_id, recipe.run_dir, status))


def _recorded(run: Run) -> RunRecord:
    """The run's record, with an MLflow run that was started or is to be resumed."""
    recipe, record = run.recipe, run.record
    uri = tracking.place_of(recipe, record)
    params = recipe.model_dump(mode="json")
    run_dir = run.absolute.run_dir
    tags = {"piflow.recipe_hash": recipe.hash(), "piflow.run_dir": run_dir}
    readable = origin.readable(recipe)
    if record is None:
        tags |= {**origin.origin(), origin.NOTE: _note(run)}
        experiment = recipe.tracking.experiment
        run_id = tracking.start(uri, experiment, recipe.name, params, tags, readable)
    else:  # an address that has worked may be away, as in mid-run
        run_id = record.mlflow_run_id
        must_answer = uri != record.tracking_uri
        tracking.resume(
            uri, run_id, run_dir, params, tags, must_answer=must_answer, readable=readable
        )
    base, files = run.base_sha256, run.base_files
    if record is not None:
        base, files = base or record.base_sha256, record.base_files or files
    record = RunRecord(
        recipe.hash(),
        recipe.identity(),
        uri,
        run_id,
        run.store.manifest_hash,
        base,
        storage.commit_of(run.absolute.model.path),
        files,
    )
    run_folder.write_record(recipe.run_dir, record)
    return record


def _tell_undelivered(problem: str | None) -> None:
    if problem is not None:
        print(
            f"MLflow lacks some of the run, which is kept in its folder: {problem}. The next "
            "`piflow distill`, `evaluate` or `export` delivers it"
        )
