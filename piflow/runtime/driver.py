"""Ray's life cycle and a run's: checks first, then the MLflow run, then Ray Train's workers."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from piflow.config import Recipe
from piflow.data.cluster import ResourcesError
from piflow.roles.fp8 import TeacherPrecisionError
from piflow.runs import folder as run_folder
from piflow.runs import tracking
from piflow.runs.folder import RunRecord
from piflow.runs.lease import PROCESS, Ownership, RunTakenError, owned
from piflow.runs.tracking import MlflowTracker, RunStatus, Tracker, deliver_kept, finish
from piflow.runtime.exits import RayLostError, WorkersLostError
from piflow.runtime.mailbox import Departure, StopReason
from piflow.runtime.progress import mailbox_with_bar
from piflow.runtime.ray_job import grace_told, stopping_told
from piflow.runtime.session import start_tries
from piflow.runtime.signals import Signals, StoppedError
from piflow.runtime.workers import collectives, failed, scaling, session_with_room
from piflow.training.preflight import Run, preflight, require_newest_of
from piflow.training.step import NonFiniteError

if TYPE_CHECKING:
    from piflow.runtime.alive import RayWatch

_POLL_SECONDS = 0.5

_FAILURES: dict[str, type[Exception]] = {
    "recipe": ValueError,
    "non-finite": NonFiniteError,
    "fp8-teacher": TeacherPrecisionError,
}


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
            uri, run_id = record.tracking_uri, record.mlflow_run_id
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
            mailbox_with_bar(recipe.name, recipe.training.steps, show=show_progress) as mailbox,
            Signals().handled() as signals,
        ):
            return _attempts(run, record, mailbox, signals, tracker, ownership)


def _end_dead_run(uri: str, run_id: str, run_dir: str) -> None:
    """A driver that was killed after its last checkpoint left its run in MLflow as running."""
    if tracking.is_running(uri, run_id):
        _tell_undelivered(finish(uri, run_id, run_dir, "FINISHED"))


def _unchanged(run: Run) -> Run:
    """The run as its owner finds it: another driver may have been at it during the checks.

    Raises:
        RunDirectoryError: another driver started it meanwhile, with another recipe or store.
    """
    record = run_folder.require_same_recipe(run.recipe)
    run_folder.require_same_store(run.recipe, record, run.store.manifest_hash)
    run_folder.require_same_base(run.recipe, record, run.base_sha256)
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
    uri = recipe.tracking.uri or tracking.default_tracking_uri(recipe.run_dir)
    params = recipe.model_dump(mode="json")
    run_dir = run.absolute.run_dir
    tags = {"piflow.recipe_hash": recipe.hash(), "piflow.run_dir": run_dir}
    if record is None:
        run_id = tracking.start(uri, recipe.tracking.experiment, recipe.name, params, tags)
    else:  # an address that has worked may be away, as in mid-run
        run_id = record.mlflow_run_id
        must_answer = uri != record.tracking_uri
        tracking.resume(uri, run_id, run_dir, params, tags, must_answer=must_answer)
    base = run.base_sha256 or (None if record is None else record.base_sha256)
    record = RunRecord(recipe.hash(), recipe.identity(), uri, run_id, run.store.manifest_hash, base)
    run_folder.write_record(recipe.run_dir, record)
    return record


def _attempts(
    run: Run,
    record: RunRecord,
    mailbox: Any,
    signals: Signals,
    tracker: Tracker,
    ownership: Ownership,
) -> int:
    """Workers from the newest checkpoint on, again and again until the last step is done.

    Ray Train restarts workers that fail, `runtime.max_failures` times. Another attempt is made here
    where they stopped because a machine is going away, and where Ray Train itself gave up before
    they were training: such is a worker that dies while its group starts.

    Returns:
        The number of optimiser steps done.
    """
    import ray

    from piflow.runtime.alive import RayWatch

    attempts, ray_watch = _Attempts(run, signals, tracker), RayWatch()
    store = ray.put(run.store)
    while True:
        attempt: Future[Any] = Future()
        arguments = (attempt, run, record, store, mailbox)
        # Ray would handle Ctrl-C in the main thread, and leave the steps since the last checkpoint
        threading.Thread(target=_fit, args=arguments, name="fit", daemon=True).start()
        try:
            _watch(attempt, mailbox, signals, tracker, ownership, ray_watch)
            left: Departure = ray_watch.answer(mailbox.departure.remote())
        except RayLostError as lost:
            attempts.require_no_signal(str(lost))
            raise
        if left.failure is not None:
            raise _FAILURES[left.failure.kind](left.failure.message)
        error = attempt.exception()
        if error is not None:
            attempts.count(error)
        elif left.reason in (StopReason.END, StopReason.MOVE) and signals.number is not None:
            raise StoppedError(signals.number, f"step {left.step} is saved")
        elif left.reason is StopReason.NONE:
            if left.step >= run.recipe.training.steps:
                return left.step
            attempts.again("the mailbox lost the workers' last word")


class _Attempts:
    """How often Ray Train gave up, and whether another attempt is made."""

    def __init__(self, run: Run, signals: Signals, tracker: Tracker) -> None:
        self._limit = run.recipe.runtime.max_failures
        self._start_timeout = run.recipe.runtime.worker_start_timeout
        self._signals = signals
        self._tracker = tracker
        self._failed = 0

    def count(self, error: BaseException) -> None:
        """An attempt failed; returns if another one is to be made.

        Raises:
            StoppedError: a signal had asked for the end anyway.
            WorkersFailedError: it is enough.
            ResourcesError: Ray Train got no places for the workers in time.
        """
        import ray.train

        from piflow.runtime.ray_private import WorkerGroupStartupTimeoutError, is_of_system

        if isinstance(error, ray.train.WorkerGroupError):  # Ray Train has counted these itself
            self.require_no_signal(str(failed(error)))
            raise failed(error) from error
        if isinstance(error, ray.train.PreemptionError):  # and these
            self.require_no_signal(str(error))
            raise WorkersLostError(
                "machines were taken away before their workers had saved, more often than "
                f"runtime.max_preemption_failures allows: {error}"
            ) from error
        cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            self.require_no_signal(str(cause))
            raise ResourcesError(
                f"the workers got no places within {self._start_timeout:.0f} s "
                "(runtime.worker_start_timeout): other jobs hold them, or machines went away. The "
                "same command goes on once there is room"
            ) from error
        if cause is error and not is_of_system(error):
            raise error
        self.again(f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}", error)

    def again(self, text: str, error: BaseException | None = None) -> None:
        """Ray Train gave up for the reason that `text` tells; raises as `count`."""
        self._tracker.event("controller-failed", text)
        self.require_no_signal(text)
        self._failed += 1
        if 0 <= self._limit < self._failed:
            raise WorkersLostError(text) from error

    def require_no_signal(self, text: str) -> None:
        """Go on only if nobody has asked for the end.

        Raises:
            StoppedError: somebody has.
        """
        number = self._signals.number
        if number is not None:
            raise StoppedError(number, f"steps since the last checkpoint are lost ({text})")


def _watch(
    attempt: Future[Any],
    mailbox: Any,
    signals: Signals,
    tracker: Tracker,
    ownership: Ownership,
    ray_watch: RayWatch,
) -> None:
    """Until the workers have ended: signals go to them, and their events to MLflow.

    Raises:
        RunTakenError: another driver owns the run by now; its workers can't seal a checkpoint.
        RayLostError: Ray is gone.
    """

    def ask_to_stop() -> bool:
        return bool(ray_watch.answer(mailbox.ask_to_stop.remote(StopReason.END)))

    def needs() -> str:
        return stopping_told(ray_watch.answer(mailbox.save_seconds.remote()))

    while not attempt.done():
        wait([attempt], timeout=_POLL_SECONDS)
        ownership.require()
        ray_watch.require()
        if ray_watch.answer(mailbox.is_machine_leaving.remote()):
            signals.machine_leaves()
        signals.pass_on(ask_to_stop, needs)
        for name, text in ray_watch.answer(mailbox.take_events.remote()):
            tracker.event(name, text)


def _fit(attempt: Future[Any], run: Run, record: RunRecord, store: Any, mailbox: Any) -> None:
    """Ray Train's workers, from their start to their end, which `attempt` then knows of.

    Ray Train's own list of checkpoints goes to a fresh local folder, and nobody reads it. It isn't
    on the run's storage: an outage while the controller writes it would end the attempt, and one of
    an earlier attempt names checkpoints that are gone.
    """
    try:
        with tempfile.TemporaryDirectory(
            prefix="piflow-ray-train-", ignore_cleanup_errors=True
        ) as notes:
            attempt.set_result(_trainer(run, record, store, mailbox, notes).fit())
    except BaseException as error:
        attempt.set_exception(error)


def _trainer(run: Run, record: RunRecord, store: Any, mailbox: Any, notes: str) -> Any:
    """Ray Train's part of the run.

    Args:
        store: reference to the run's opened store, which workers take from Ray's object store.
        notes: a local folder for Ray Train's own list of checkpoints.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from piflow.runtime.process_group import ClusterTorchConfig
    from piflow.runtime.ray_private import LifecycleCallback
    from piflow.runtime.worker import train_worker

    recipe = run.absolute
    runtime = recipe.runtime
    callbacks: list[Any] = [LifecycleCallback(mailbox, runtime.stall_timeout)]
    failures: dict[str, Any] = {
        "max_failures": runtime.max_failures,
        "controller_failure_limit": start_tries(runtime),
        "max_preemption_failures": runtime.max_preemption_failures,
        "preemption_grace_s": runtime.preemption_grace_s,
        "relax_collectives_on_preemption": runtime.relax_collectives_on_preemption,
    }
    config: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "written": run.recipe.model_dump(mode="json"),
        "manifest_hash": record.manifest_hash,
        "tracking_uri": record.tracking_uri,
        "run_id": record.mlflow_run_id,
        "store": store,
        "mailbox": mailbox,
        "owner": PROCESS,
    }
    return TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=ClusterTorchConfig(backend=collectives(runtime)),
        scaling_config=scaling(runtime, runtime.resize_interval),
        run_config=ray.train.RunConfig(
            name=run_folder.CHECKPOINTS,
            storage_path=notes,
            failure_config=ray.train.FailureConfig(**failures),
            callbacks=callbacks,
        ),
    )


def _tell_undelivered(problem: str | None) -> None:
    if problem is not None:
        print(
            f"MLflow lacks some of the run, which is kept in its folder: {problem}. The next "
            "`piflow distill`, `evaluate` or `export` delivers it"
        )
