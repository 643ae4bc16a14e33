"""What driver, Ray Train's controller and workers tell one another: one actor a run.

    rank 0 -- joined, did, left --> Mailbox <-- ask_to_stop -- driver (signals), controller (resize)
    rank 0 <------- requested ------         --- take_events --> driver --> MLflow
    rank 0 -- figures --> Mailbox            --- take_figures --> driver: prediction beside it

Failures travel this way as well, and only this way: a worker that finds out that no further try can
help says so here before it does anything else. The mailbox lives on the driver's machine, which no
preemption of workers takes away. If its process dies, Ray starts it anew, with nothing in it: who
asks for something asks again and again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from piflow.runs.predicted import Measured, Workers
from piflow.runtime.draining import is_draining
from piflow.runtime.metrics import RunMetrics


class StopReason(IntEnum):
    """Why workers save and stop before the last step; if there are several, the largest counts."""

    NONE = 0
    RESIZE = 1  # Ray Train is about to start another number of workers
    MOVE = 2  # a machine is going away: start again on others
    END = 3  # the driver was told to stop


@dataclass(frozen=True)
class Failure:
    """Why workers stopped by themselves, where another try would end the same way."""

    kind: Literal["recipe", "non-finite", "fp8-teacher"]
    message: str


@dataclass(frozen=True)
class Departure:
    """How the last workers ended.

    Attributes:
        reason: what made them stop before the last step.
        step: optimiser steps that are done and saved.
        failure: set if another try would end the same way.
    """

    reason: StopReason = StopReason.NONE
    step: int = 0
    failure: Failure | None = None


class Mailbox:
    """What was said last, by whom it concerns. Its methods are called through a Ray handle.

    Args:
        run: name of a training run, of which Prometheus is told; None: another job.
        steps: of the whole run.
    """

    def __init__(self, run: str | None = None, steps: int = 0) -> None:
        self._metrics = RunMetrics(run, steps)
        self._latest: tuple[int, str] = (0, "starting workers")
        self._when = time.monotonic()  # something was last heard of the workers
        self._world_size = 0
        self._running = False
        self._asked = StopReason.NONE
        self._reason = StopReason.NONE
        self._saved = 0
        self._failure: Failure | None = None
        self._events: list[tuple[str, str]] = []
        self._logs: list[str] = []
        self._machines: list[tuple[int, dict[str, float]]] = []
        self._figures: list[Workers | Measured] = []
        self._save_seconds: float | None = None

    def join(self, world_size: int) -> int:
        """Workers start; returns how many there were before them, 0 if they are the first."""
        before, self._world_size = self._world_size, world_size
        self._running = True
        self._reason, self._saved = StopReason.NONE, 0
        if self._asked is StopReason.RESIZE:  # this is the new number
            self._asked = StopReason.NONE
        self._when = time.monotonic()
        self._metrics.started(world_size)
        return before

    def update(self, step: int, text: str) -> None:
        """A step is done."""
        self._latest = (step, text)
        self._when = time.monotonic()
        self._metrics.stepped(step)
        self._running = True

    def save_took(self, seconds: float) -> None:
        """A checkpoint is complete.

        Args:
            seconds: from a request to stop until all is saved, as the last step and this checkpoint
                had it.
        """
        self._metrics.saved()
        self._save_seconds = seconds

    def save_seconds(self) -> float | None:
        """How long a save will take; None: there was none yet."""
        return self._save_seconds

    def give_up(self, failure: Failure) -> None:
        """No other try can help: workers that are started all the same leave at once."""
        self._failure = self._failure or failure
        self._metrics.gave_up(failure.kind)

    def failure(self) -> Failure | None:
        """Why no other try can help, if a worker said so."""
        return self._failure

    def leave(self, reason: StopReason, step: int) -> None:
        """Workers end after so many steps, with all of them saved."""
        self._reason, self._saved = reason, step
        self._running = False
        self._metrics.ended()

    def departure(self) -> Departure:
        """How the last workers ended."""
        return Departure(self._reason, self._saved, self._failure)

    def read(self) -> tuple[int, str]:
        """Newest step and its text."""
        return self._latest

    def is_machine_leaving(self) -> bool:
        """Whether the driver's machine is about to be taken away."""
        return is_draining()

    def ask_to_stop(self, reason: StopReason) -> bool:
        """Workers shall save and stop; returns whether there are any."""
        self._asked = max(self._asked, reason)
        return self._running

    def requested(self) -> StopReason:
        """What was asked for."""
        return self._asked

    def failed(self, text: str, stall_timeout: float) -> None:
        """A worker failed; if no step was heard of for most of `stall_timeout`, it had stalled."""
        silent = time.monotonic() - self._when
        if silent > 0.9 * stall_timeout:
            told = f"no step for {silent:.0f} s; the workers' logs say where each was. {text}"
            self._events.append(("stall", told))
            self._metrics.failed("stall")
        else:
            self._events.append(("worker-failed", text))
            self._metrics.failed("failed")
        self._running = False

    def keep_log(self, text: str) -> None:
        """The end of a failed worker's log, for the driver's terminal."""
        self._logs.append(text)

    def take_logs(self) -> list[str]:
        """What was kept since the last call."""
        logs, self._logs = self._logs, []
        return logs

    def take_events(self) -> list[tuple[str, str]]:
        """(name, text) of what happened since the last call."""
        events, self._events = self._events, []
        return events

    def machine(self, step: int, values: dict[str, float]) -> None:
        """How a machine is doing at a step, by names of metrics."""
        self._machines.append((step, values))

    def take_machines(self) -> list[tuple[int, dict[str, float]]]:
        """(step, values) of the machines since the last call."""
        machines, self._machines = self._machines, []
        return machines

    def figures(self, told: Workers | Measured) -> None:
        """Workers have started, or have measured what such a start comes to."""
        self._figures.append(told)

    def take_figures(self) -> list[Workers | Measured]:
        """What was told of starts since the last call, in order."""
        figures, self._figures = self._figures, []
        return figures


def start_mailbox(run: str | None = None, steps: int = 0) -> Any:
    """The handle of a mailbox on this process's machine; arguments as `Mailbox` has them."""
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(
        Mailbox
    )
    return actor.remote(run, steps)
