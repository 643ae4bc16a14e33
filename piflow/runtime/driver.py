"""Ray's life cycle and a run's: checks first, then the MLflow run, then Ray Train's workers."""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import Future, wait
from typing import Any

from piflow import storage
from piflow.config import Recipe, RuntimeConfig
from piflow.roles.fp8 import TeacherPrecisionError
from piflow.runs import folder as run_folder
from piflow.runs.lease import PROCESS, owned
from piflow.runs.tracking import RunStatus, Tracker, deliver_kept, finish
from piflow.runtime.session import ray_session
from piflow.runtime.signals import Signals, StoppedError
from piflow.training.checkpoint import load_state
from piflow.training.preflight import absolute_recipe, check_store
from piflow.training.step import NonFiniteError

_POLL_SECONDS = 0.5

_FAILURES: dict[str, type[Exception]] = {
    "recipe": ValueError,
    "non-finite": NonFiniteError,
    "fp8-teacher": TeacherPrecisionError,
}


class WorkersFailedError(ChildProcessError):
    """The workers failed more often than `runtime.max_failures` allows; says why the last did."""


class ControllerFailedError(RuntimeError):
    """Ray Train gave up for something that it doesn't restart workers for; the driver does.

    Such is a worker that dies before its train loop starts.
    """


def train(recipe: Recipe, *, show_progress: bool = True) -> int:
    """Start the recipe's run, or go on with it from its newest checkpoint.

    Returns:
        The number of optimiser steps done.

    Raises:
        ValueError: the run directory belongs to another recipe or store, or store, model and recipe
            don't fit one another; or another driver is at it.
        NonFiniteError: the loss went NaN or infinite; the newest checkpoint is good.
        WorkersFailedError: the workers failed more often than `runtime.max_failures` allows.
        StoppedError: a signal ended it before the last step.
    """
    run_folder.require_same_recipe(recipe)  # a command that is refused leaves nothing behind
    manifest_hash = check_store(recipe).manifest_hash
    with owned(recipe.run_dir):
        return _train(recipe, manifest_hash, show_progress=show_progress)


def _train(recipe: Recipe, manifest_hash: str, *, show_progress: bool) -> int:
    record = run_folder.require_same_recipe(recipe)  # others may have written it meanwhile
    run_folder.require_same_store(recipe, record, manifest_hash)
    found = run_folder.checkpoints(recipe.run_dir)
    if record is not None and found and max(found) >= recipe.training.steps:
        _tell_undelivered(deliver_kept(record.tracking_uri, record.mlflow_run_id, recipe.run_dir))
        print(
            f"{recipe.name}: all {recipe.training.steps} steps are done; raise training.steps "
            "to go on"
        )
        return max(found)
    record = _tracked(recipe, record, manifest_hash)
    with ray_session(recipe):
        _fit(absolute_recipe(recipe), record, show_progress=show_progress)
    return load_state(storage.local_folder(run_folder.newest_checkpoint(recipe.run_dir))).step


def _tracked(
    recipe: Recipe, record: run_folder.RunRecord | None, manifest_hash: str
) -> run_folder.RunRecord:
    """The run's record, with an MLflow run that was started or is to be resumed."""
    from piflow.runs import tracking

    uri = recipe.tracking.uri or tracking.default_tracking_uri(recipe.run_dir)
    params = recipe.model_dump(mode="json")
    run_dir = storage.absolute(recipe.run_dir)
    tags = {"piflow.recipe_hash": recipe.hash(), "piflow.run_dir": run_dir}
    if record is None:
        run_id = tracking.start(uri, recipe.tracking.experiment, recipe.name, params, tags)
    else:  # an address that has worked may be away, as in mid-run
        run_id = record.mlflow_run_id
        must_answer = uri != record.tracking_uri
        tracking.resume(uri, run_id, run_dir, params, tags, must_answer=must_answer)
    record = run_folder.RunRecord(recipe.hash(), recipe.identity(), uri, run_id, manifest_hash)
    run_folder.write_record(recipe.run_dir, record)
    return record


def _collectives(runtime: RuntimeConfig) -> str:
    """torch.distributed's backend."""
    if not runtime.use_gpu:
        return "gloo"
    # gradients that lie in host memory are clipped there
    return "cpu:gloo,cuda:nccl" if runtime.offload == "cpu" else "nccl"


def _fit(recipe: Recipe, record: run_folder.RunRecord, *, show_progress: bool) -> None:
    """Workers train until the last step; they start anew where they stopped for that."""
    from piflow.runs.tracking import MlflowTracker
    from piflow.runtime.mailbox import start_board
    from piflow.runtime.progress import progress_bar

    board = start_board()
    title = f"{recipe.name}: steps"
    tracker = MlflowTracker(record.tracking_uri, record.mlflow_run_id, recipe.run_dir)
    status: RunStatus = "FAILED"
    try:
        with (
            progress_bar(board, title, recipe.training.steps, show=show_progress),
            Signals() as signals,
        ):
            _attempts(recipe, record, board, signals, tracker)
        status = "FINISHED"
    except StoppedError:
        status = "KILLED"
        raise
    finally:
        tracker.close()
        _finish(recipe, record, status)


def _attempts(
    recipe: Recipe, record: run_folder.RunRecord, board: Any, signals: Signals, tracker: Tracker
) -> None:
    """One after another, until the last step."""
    from piflow.runtime.mailbox import StopReason

    failures = 0
    while True:
        try:
            if _attempt(recipe, record, board, signals, tracker) != StopReason.MOVE:
                return
        except ControllerFailedError as error:
            tracker.event("controller-failed", str(error))
            failures += 1
            if 0 <= recipe.runtime.max_failures < failures:
                raise WorkersFailedError(str(error)) from error


def _attempt(
    recipe: Recipe, record: run_folder.RunRecord, board: Any, signals: Signals, tracker: Tracker
) -> int:
    """Workers from the newest checkpoint on, restarted when they fail; returns why they ended."""
    import ray

    run_folder.take_failure(recipe.run_dir)  # of an attempt whose driver died before it looked
    fit: Future[Any] = Future()

    def run() -> None:
        try:
            with tempfile.TemporaryDirectory(
                prefix="piflow-ray-train-", ignore_cleanup_errors=True
            ) as notes:
                result = _trainer(recipe, record, board, notes).fit()
            fit.set_result(result)
        except BaseException as error:
            fit.set_exception(error)

    # Ray would handle Ctrl-C in the main thread, and leave the steps since the last checkpoint
    threading.Thread(target=run, name="fit", daemon=True).start()
    while not fit.done():
        wait([fit], timeout=_POLL_SECONDS)
        signals.pass_on(board)
        for name, text in ray.get(board.take_events.remote()):
            tracker.event(name, text)
    try:
        fit.result()
    except ray.train.WorkerGroupError as error:
        from piflow.runtime.ray_private import first_failure

        raise WorkersFailedError(first_failure(error.worker_failures)) from error
    except ray.train.ControllerError as error:
        cause = error.controller_failure
        text = next(iter(str(cause).splitlines()), "")
        raise ControllerFailedError(f"{type(cause).__name__}: {text}") from error
    failure = run_folder.take_failure(recipe.run_dir)
    if failure is not None:
        raise _FAILURES[failure.kind](failure.message)
    reason, step = ray.get(board.left.remote())
    if signals.number is not None and step < recipe.training.steps:
        raise StoppedError(signals.number, f"step {step} is saved")
    return int(reason)


def _trainer(recipe: Recipe, record: run_folder.RunRecord, board: Any, notes: str) -> Any:
    """Ray Train's part of the run.

    Args:
        notes: a fresh local folder for Ray Train's own list of checkpoints, which nobody reads. It
            isn't on the run's storage: an outage while the controller writes it would end the
            attempt, and one of an earlier attempt names checkpoints that are gone.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from piflow.runtime.ray_private import LifecycleCallback
    from piflow.runtime.worker import train_worker

    runtime = recipe.runtime
    # a pair makes Ray Train elastic, which its declared types don't know
    workers: Any = runtime.worker_range if runtime.is_elastic else runtime.max_workers
    callbacks: list[Any] = [LifecycleCallback(board, runtime.stall_timeout)]
    scaling: dict[str, Any] = {"elastic_resize_monitor_interval_s": runtime.resize_interval}
    resources: dict[str, float] = {"CPU": runtime.cpus_per_worker}
    if runtime.use_gpu:
        resources["GPU"] = 1
    config: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": record.recipe_hash,
        "tracking_uri": record.tracking_uri,
        "run_id": record.mlflow_run_id,
        "board": board,
        "owner": PROCESS,
    }
    return TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend=_collectives(runtime)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=runtime.use_gpu,
            resources_per_worker=resources,
            **scaling,
        ),
        run_config=ray.train.RunConfig(
            name=run_folder.CHECKPOINTS,
            storage_path=notes,
            failure_config=ray.train.FailureConfig(max_failures=runtime.max_failures),
            callbacks=callbacks,
        ),
    )


def _finish(recipe: Recipe, record: run_folder.RunRecord, status: RunStatus) -> None:
    """Tell MLflow how the run ended; if it is away, whoever comes next does."""
    run_id = record.mlflow_run_id
    _tell_undelivered(finish(record.tracking_uri, run_id, recipe.run_dir, status))


def _tell_undelivered(problem: str | None) -> None:
    if problem is not None:
        print(
            f"MLflow lacks some of the run, which is kept in its folder: {problem}. The next "
            "`piflow distill`, `evaluate` or `export` delivers it"
        )
