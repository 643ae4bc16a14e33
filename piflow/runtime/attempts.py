"""Ray Train's workers, again and again until all of their work is done.

Training and drawing for an evaluation are such work: what differs stands in a `Work`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from piflow.config import RuntimeConfig
from piflow.data.cluster import ResourcesError
from piflow.roles.fp8 import TeacherPrecisionError
from piflow.runs import folder as run_folder
from piflow.runs.predicted import Measured, Workers
from piflow.runs.tracking import Tracker
from piflow.runtime.exits import RayLostError, WorkersLostError
from piflow.runtime.mailbox import Departure, StopReason
from piflow.runtime.ray_job import stopping_told
from piflow.runtime.session import start_tries
from piflow.runtime.signals import Signals, StoppedError
from piflow.runtime.workers import collectives, failed, scaling
from piflow.storage.scratch import scratch
from piflow.training.step import NonFiniteError

if TYPE_CHECKING:
    from piflow.runtime.alive import RayWatch

_POLL_SECONDS = 0.5

_FAILURES: dict[str, type[Exception]] = {
    "recipe": ValueError,
    "non-finite": NonFiniteError,
    "fp8-teacher": TeacherPrecisionError,
}


@dataclass(frozen=True)
class Work:
    """What workers do.

    Attributes:
        function: what Ray Train runs on each.
        config: what it is called with; the mailbox comes to it.
        runtime: how many workers there are, and on what.
        total: when they have done so much they are done, by what they tell the mailbox.
        kept: says of so much done that it is saved ("step 7 is saved").
        require: raises once this driver may do no more.
        figures: is told of workers that have started, and of what they measure.
    """

    function: Callable[[dict[str, Any]], None]
    config: Mapping[str, Any]
    runtime: RuntimeConfig
    total: int
    kept: Callable[[int], str]
    require: Callable[[], None] = lambda: None
    figures: Callable[[Workers | Measured], None] = lambda _: None


def done_by_attempts(work: Work, mailbox: Any, signals: Signals, tracker: Tracker) -> int:
    """Workers go on with what is saved, again and again until the work is done.

    Ray Train restarts workers that fail, `runtime.max_failures` times. Another attempt is made here
    where they stopped because a machine is going away, and where Ray Train itself gave up before
    they were at work: such is a worker that dies while its group starts.

    Returns:
        How much is done.

    Raises:
        ValueError, NonFiniteError, TeacherPrecisionError: what the workers gave up for.
        StoppedError: a signal ended it.
        WorkersFailedError: they failed more often than `runtime.max_failures` allows.
        RayLostError: Ray itself ended.
    """
    from piflow.runtime.alive import RayWatch

    attempts, ray_watch = _Attempts(work.runtime, signals, tracker), RayWatch()
    while True:
        attempt: Future[Any] = Future()
        arguments = (attempt, work, mailbox)
        # Ray would handle Ctrl-C in the main thread, and leave the steps since the last checkpoint
        threading.Thread(target=_fit, args=arguments, name="fit", daemon=True).start()
        try:
            _watch(attempt, mailbox, signals, tracker, work, ray_watch)
            for told in ray_watch.answer(mailbox.take_figures.remote()):  # the last ones
                work.figures(told)
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
            raise StoppedError(signals.number, work.kept(left.step))
        elif left.reason is StopReason.NONE:
            if left.step >= work.total:
                return left.step
            attempts.again("the mailbox lost the workers' last word")


class _Attempts:
    """How often Ray Train gave up, and whether another attempt is made."""

    def __init__(self, runtime: RuntimeConfig, signals: Signals, tracker: Tracker) -> None:
        self._limit = runtime.max_failures
        self._start_timeout = runtime.worker_start_timeout
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
            raise StoppedError(number, f"{self._signals.unsaved} ({text})")


def _watch(
    attempt: Future[Any],
    mailbox: Any,
    signals: Signals,
    tracker: Tracker,
    work: Work,
    ray_watch: RayWatch,
) -> None:
    """Until the workers have ended: signals go to them, and their events and figures to MLflow.

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
        work.require()
        ray_watch.require()
        if ray_watch.answer(mailbox.is_machine_leaving.remote()):
            signals.machine_leaves()
        signals.pass_on(ask_to_stop, needs)
        for name, text in ray_watch.answer(mailbox.take_events.remote()):
            tracker.event(name, text)
        for step, values in ray_watch.answer(mailbox.take_machines.remote()):
            tracker.log_metrics(values, step=step)
        for told in ray_watch.answer(mailbox.take_figures.remote()):
            work.figures(told)


def _fit(attempt: Future[Any], work: Work, mailbox: Any) -> None:
    """Ray Train's workers, from their start to their end, which `attempt` then knows of.

    Ray Train's own list of checkpoints goes to a fresh local folder, and nobody reads it. It isn't
    on the run's storage: an outage while the controller writes it would end the attempt, and one of
    an earlier attempt names checkpoints that are gone.
    """
    try:
        with scratch("ray-train") as notes:
            attempt.set_result(_trainer(work, mailbox, str(notes)).fit())
    except BaseException as error:
        attempt.set_exception(error)


def _trainer(work: Work, mailbox: Any, notes: str) -> Any:
    """Ray Train's part of the work.

    Args:
        notes: a local folder for Ray Train's own list of checkpoints.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from piflow.runtime.process_group import ClusterTorchConfig
    from piflow.runtime.ray_private import LifecycleCallback

    runtime = work.runtime
    callbacks: list[Any] = [LifecycleCallback(mailbox, runtime.stall_timeout)]
    failures: dict[str, Any] = {
        "max_failures": runtime.max_failures,
        "controller_failure_limit": start_tries(runtime),
        "max_preemption_failures": runtime.max_preemption_failures,
        "preemption_grace_s": runtime.preemption_grace_s,
        "relax_collectives_on_preemption": runtime.relax_collectives_on_preemption,
    }
    return TorchTrainer(
        work.function,
        train_loop_config={**work.config, "mailbox": mailbox},
        torch_config=ClusterTorchConfig(backend=collectives(runtime)),
        scaling_config=scaling(runtime, runtime.resize_interval),
        run_config=ray.train.RunConfig(
            name=run_folder.CHECKPOINTS,
            storage_path=notes,
            failure_config=ray.train.FailureConfig(**failures),
            callbacks=callbacks,
        ),
    )
