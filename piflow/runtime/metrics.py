"""What a run tells Prometheus, through Ray.

    worker, rank r -- WorkerMetrics --+
    mailbox of the run -- RunMetrics -+--> Ray's agent of the same machine --> its page /metrics

An update changes a number in this process, in a few microseconds; Ray's own thread sends them to
the agent every 10 s (`RAY_metrics_report_interval_ms`). What is set here is known to the host
anyway: nothing waits for a GPU. Ray puts `ray_` before the names, and labels with the machine
(`NodeAddress`), the process (`WorkerId`) and the cluster's session.

Numbers of the run as a whole come from the mailbox, which outlives workers: when these are gone,
their gauges are gone as well, and that is when somebody wants to know. Counters stay on the page.

Ray forgets a gauge that nobody has set for two of its reports, and then an alert on it can't fire.
So each process sets its gauges again every two seconds, as long as it lives.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge

_log = logging.getLogger(__name__)

# Ray refuses to add 0 to a counter, and one that is absent until it counts hides its first increase
_AS_GOOD_AS_ZERO = 5e-324
_AGAIN_SECONDS = 2.0  # Ray reports every 10 s, or every second at most


@dataclass(frozen=True)
class Metric:
    """A metric's meaning, and the label that it has beside the run's name and the rank.

    Attributes:
        by: the label's name, and the values that a counter starts with.
    """

    kind: Literal["counter", "gauge"]
    meaning: str
    by: tuple[str, tuple[str, ...]] | None = None


_PARTS = ("part", ("data", "gradients", "update", "pictures", "checkpoint", "other"))

RUN_METRICS = {
    "piflow_steps_planned": Metric("gauge", "Optimiser steps of the whole run."),
    "piflow_step": Metric("gauge", "Optimiser steps that are done, skipped ones with them."),
    "piflow_last_step_timestamp_seconds": Metric(
        "gauge", "Unix time of the last step; before the first one, when the driver started."
    ),
    "piflow_workers": Metric(
        "gauge", "Workers that train; 0 while they start, and after one of them has failed."
    ),
    "piflow_worker_starts_total": Metric(
        "counter", "Starts of all workers: the first, restarts, and after a resize or a move."
    ),
    "piflow_worker_failures_total": Metric(
        "counter",
        "Workers that failed: an error, a process that died, or no step for "
        "`runtime.stall_timeout` (stall).",
        ("kind", ("failed", "stall")),
    ),
    "piflow_given_up_total": Metric(
        "counter",
        "Ends of the run that no restart can cure.",
        ("kind", ("recipe", "non-finite", "fp8-teacher")),
    ),
    "piflow_checkpoint_timestamp_seconds": Metric(
        "gauge",
        "Unix time when the newest checkpoint was complete; before this driver's first one, when "
        "its workers started.",
    ),
}

WORKER_METRICS = {
    "piflow_steps_total": Metric("counter", "Steps that this worker has done."),
    "piflow_step_seconds_total": Metric(
        "counter",
        "Wall time of steps by part: waiting for data; gradients (forward and backward, with the "
        "workers' exchange); update (clipping, optimiser, averages); pictures; checkpoint (until "
        "training goes on); other. On a GPU, kernels that the update started may still run in the "
        "next step's gradients.",
        _PARTS,
    ),
    "piflow_images_total": Metric(
        "counter", "Images that this worker has trained on; the sum over ranks is the run's."
    ),
    "piflow_flops_total": Metric(
        "counter",
        "Operations of this worker's training by the family's formula: matrix products and "
        "attention, without what is computed twice.",
    ),
    "piflow_peak_flops": Metric(
        "gauge",
        "Operations a second of this worker's device at best: `runtime.peak_tflops`, or the data "
        "sheet's of a known GPU (dense bfloat16); else absent.",
    ),
    "piflow_gpu_memory_peak_bytes": Metric(
        "gauge", "The most GPU memory that tensors of this worker have had; with a GPU."
    ),
    "piflow_gpu_memory_reserved_bytes": Metric(
        "gauge", "GPU memory that this worker's allocator holds; with a GPU."
    ),
    "piflow_gpu_memory_total_bytes": Metric("gauge", "Memory of this worker's GPU; with a GPU."),
    "piflow_host_memory_peak_bytes": Metric(
        "gauge", "The most host memory that this worker's process has had resident."
    ),
}

RANK_0_METRICS = {
    "piflow_loss": Metric("gauge", "Loss of the last step, over the global batch."),
    "piflow_grad_norm": Metric("gauge", "Gradient's norm of the last step, before clipping."),
    "piflow_learning_rate": Metric("gauge", "The schedule's learning rate of the last step."),
    "piflow_skipped_steps_total": Metric(
        "counter", "Steps left out since this worker started: loss or gradient wasn't finite."
    ),
    "piflow_checkpoint_step": Metric("gauge", "Step of the newest complete checkpoint."),
    "piflow_checkpoint_stall_seconds": Metric(
        "gauge", "How long training waited for the newest checkpoint."
    ),
    "piflow_checkpoint_write_seconds": Metric(
        "gauge", "How long it took from then until the newest checkpoint was complete."
    ),
    "piflow_fp8_teacher_error": Metric(
        "gauge", "How far the 8-bit teacher was off at its last check; with `model.fp8_teacher`."
    ),
    "piflow_fp8_teacher_error_limit": Metric(
        "gauge", "`model.fp8_teacher.max_error`, at which the run ends; with `model.fp8_teacher`."
    ),
}


class Metrics:
    """Metrics by their names, with labels that all of them have.

    No update ever fails: what goes wrong is told once, and from then on nothing is exported.

    Args:
        off: nothing is exported from the start.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], labels: Mapping[str, str], *, off: bool = False
    ) -> None:
        self._off = off
        if off:
            return
        self._metrics: dict[str, Any] = {}
        self._gauges: dict[str, float] = {}
        self._lock = threading.Lock()  # so that no older value follows a newer one
        with self.harmless():
            for name, metric in metrics.items():
                label, values = metric.by or ("", ())
                keys = (*labels, label) if label else tuple(labels)
                kind = Counter if metric.kind == "counter" else Gauge
                made: Any = kind(name, description=metric.meaning, tag_keys=keys)
                self._metrics[name] = made.set_default_tags(dict(labels))
                if metric.kind == "counter":
                    for by in [{label: value} for value in values] or [{}]:
                        made.inc(_AS_GOOD_AS_ZERO, by)
            threading.Thread(
                target=_keep_alive, args=(weakref.ref(self),), name="metrics", daemon=True
            ).start()

    def set_again(self) -> bool:
        """All gauges, to the values that they have; false: nothing is exported any more."""
        with self.harmless(), self._lock:
            for name, value in self._gauges.items():
                self._metrics[name].set(value)
        return not self._off

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """For whatever has to do with metrics: it may fail."""
        try:
            yield
        except Exception as error:  # whatever it is: a run doesn't end for the sake of its metrics
            told, self._off = self._off, True
            if not told:
                _log.warning("no metrics for Prometheus: %s: %s", type(error).__name__, error)

    def set(self, name: str, value: float) -> None:
        """A gauge's value."""
        if not self._off:
            with self.harmless(), self._lock:
                self._metrics[name].set(float(value))
                self._gauges[name] = float(value)

    def add(self, name: str, value: float = 1.0, by: Mapping[str, str] | None = None) -> None:
        """Count more; nothing if there is no more."""
        if value > 0 and not self._off:
            with self.harmless():
                self._metrics[name].inc(value, None if by is None else dict(by))


def _keep_alive(of: weakref.ref[Metrics]) -> None:
    """Set the gauges again and again, until nobody holds them."""
    while True:
        time.sleep(_AGAIN_SECONDS)
        metrics = of()
        if metrics is None or not metrics.set_again():
            return
        del metrics


class RunMetrics:
    """What is known of a run as long as its driver lives; in the mailbox's process.

    Args:
        run: the recipe's name; None: nothing is told.
        steps: of the whole run.
    """

    def __init__(self, run: str | None, steps: int) -> None:
        self._metrics = Metrics(RUN_METRICS, {"run": run or ""}, off=run is None)
        self._metrics.set("piflow_steps_planned", steps)
        self._metrics.set("piflow_workers", 0)
        self._metrics.set("piflow_last_step_timestamp_seconds", time.time())
        self._has_saved = False

    def started(self, workers: int) -> None:
        """So many workers train."""
        self._metrics.set("piflow_workers", workers)
        self._metrics.add("piflow_worker_starts_total")
        if not self._has_saved:
            self._metrics.set("piflow_checkpoint_timestamp_seconds", time.time())

    def stepped(self, done: int) -> None:
        """A step is done, the run's `done`-th."""
        self._metrics.set("piflow_step", done)
        self._metrics.set("piflow_last_step_timestamp_seconds", time.time())

    def saved(self) -> None:
        """A checkpoint is complete."""
        self._has_saved = True
        self._metrics.set("piflow_checkpoint_timestamp_seconds", time.time())

    def failed(self, kind: Literal["failed", "stall"]) -> None:
        """A worker did, and all of them end."""
        self._metrics.add("piflow_worker_failures_total", by={"kind": kind})
        self.ended()

    def gave_up(self, kind: str) -> None:
        """The run ends, for a reason that no restart can cure."""
        self._metrics.add("piflow_given_up_total", by={"kind": kind})

    def ended(self) -> None:
        """No worker trains."""
        self._metrics.set("piflow_workers", 0)
