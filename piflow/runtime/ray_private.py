"""What uses Ray's insides: saving before a resize, telling of failures, a look at Ray itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.job_config import JobConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError as WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from piflow.runtime.mailbox import StopReason
from piflow.runtime.worker_log import Place, log_of

_POLL_SECONDS = 0.2


class _TidyWorkerGroup(WorkerGroup):
    """Gives back its places when a worker dies while the group starts.

    Ray Train keeps them (its placement group) if that happens after the workers' processes are
    there, and the next group then waits for places that nobody uses.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self.shutdown()
            raise


class LifecycleCallback(ControllerCallback, WorkerGroupCallback):
    """Runs in the controller's process.

    Args:
        mailbox: the run's.
        stall_timeout: seconds without a step that count as a stall; also how long workers may take
            to save before a resize.
    """

    def __init__(self, mailbox: Any, stall_timeout: float) -> None:
        self._mailbox = mailbox
        self._stall_timeout = stall_timeout
        self._group: Any = None  # of workers that run
        self._places: list[Place] = []  # of its workers, by rank
        self._told = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Have the controller make tidy groups."""
        TrainController.worker_group_cls = _TidyWorkerGroup

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Workers run from now on: remember them, to save before a resize."""
        self._group, self._told = worker_group, False
        machines = [worker.metadata for worker in worker_group.get_workers()]
        self._places = [Place(here.node_id, here.pid, here.hostname) for here in machines]

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """There are none to save any more."""
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Tell of a group's first failure; the others mostly follow from it."""
        if worker_group_status.errors and not self._told:
            self._told = True
            text = first_failure(worker_group_status.errors)
            self._mailbox.failed.remote(text, self._stall_timeout)
            rank = min(worker_group_status.errors)
            if rank < len(self._places):
                self._mailbox.keep_log.remote(log_of(rank, self._places[rank]))

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ray Train ends running workers as they are: have them save and end before it does."""
        if self._group is None or self._told:
            return
        ray.get(self._mailbox.ask_to_stop.remote(StopReason.RESIZE))
        end = time.monotonic() + self._stall_timeout
        while time.monotonic() < end:
            status = self._group.poll_status(timeout=self._stall_timeout)
            if status.finished or status.errors:
                return
            time.sleep(_POLL_SECONDS)


def first_failure(failures: Mapping[int, Exception]) -> str:
    """What the lowest failed rank raised, without the remote traceback that comes before it."""
    if not failures:
        return "the workers failed"
    rank = min(failures)
    lines = str(failures[rank]).strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("  ")]
    message = "\n".join(lines[starts[-1] + 1 :] if starts else lines)
    return f"worker {rank} failed: {message}"


def is_of_system(failure: BaseException) -> bool:
    """Whether Ray or a machine failed, and not the code that ran there."""
    mine = ray.exceptions.RayTaskError | ray.exceptions.OutOfMemoryError
    if isinstance(failure, mine):
        return False
    return isinstance(failure, ray.exceptions.RayError | WorkerHealthCheckTimeoutError)


def ended_processes() -> list[str]:
    """Those of Ray's own that it can't do without, if this process started them and they ended."""
    node = ray_worker._global_node
    ended: set[str] = set()
    if node is not None:
        ended = {name for name, _ in node.dead_processes()}
    return sorted(ended & {"gcs_server", "raylet"})


class _SearchPath(list[str]):
    """Of a job's workers, which Ray appends the driver's working directory to."""

    def extend(self, paths: Iterable[str]) -> None:
        super().extend(path for path in paths if os.path.realpath(path) != os.getcwd())


def job_config() -> JobConfig:
    """For `ray.init`: workers don't import from the driver's working directory.

    Ray puts it before the installed packages, so that a `PIL.py` there would be run in place of
    the package.
    """
    config = JobConfig()
    config._py_driver_sys_path = _SearchPath()
    return config
