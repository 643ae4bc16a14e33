"""What a worker tells Prometheus of its steps."""

from __future__ import annotations

import resource
import time
from typing import Literal

import torch

from piflow.planning.hardware import load_table
from piflow.runtime.metrics import RANK_0_METRICS, WORKER_METRICS, Metrics
from piflow.training.checkpoint_writer import Saved
from piflow.training.step import StepMetrics

_KIB = 1024

Part = Literal["data", "gradients", "update", "pictures", "checkpoint", "other"]


class WorkerMetrics:
    """What a worker knows of its steps; on rank 0 also what all of them agree on.

    Args:
        run: the recipe's name.
        rank: the worker's.
        peak: TFLOP/s of its device, for utilisation; None: as its data sheet says, if it is known.
        device: that it computes on.
    """

    def __init__(self, run: str, rank: int, peak: float | None, device: torch.device) -> None:
        known = {**WORKER_METRICS, **RANK_0_METRICS} if rank == 0 else WORKER_METRICS
        self._metrics = Metrics(known, {"run": run, "rank": str(rank)})
        self._device = device if device.type == "cuda" else None
        self._lap = 0.0
        with self._metrics.harmless():
            if self._device is not None:
                properties = torch.cuda.get_device_properties(self._device)
                self._metrics.set("piflow_gpu_memory_total_bytes", properties.total_memory)
                peak = peak or load_table().peak_of_device(properties.name)
            if peak is not None:
                self._metrics.set("piflow_peak_flops", 1e12 * peak)

    def begin(self) -> None:
        """A step begins."""
        self._lap = time.perf_counter()

    def lap(self, part: Part, without: float = 0.0) -> None:
        """All the time since the lap before went into `part`, but for some seconds told apart."""
        now = time.perf_counter()
        self._add_seconds(part, now - self._lap - without)
        self._lap = now

    def stepped(self, metrics: StepMetrics, images: float, flops: float) -> None:
        """A step's network passes and update are over.

        Args:
            images: that this worker has trained on.
            flops: operations of training on one image.
        """
        self.lap("gradients", without=metrics.update_seconds)
        self._add_seconds("update", metrics.update_seconds)
        self._metrics.add("piflow_steps_total")
        self._metrics.add("piflow_images_total", images)
        self._metrics.add("piflow_flops_total", images * flops)
        with self._metrics.harmless():
            self._read_memory()

    def agreed(self, metrics: StepMetrics) -> None:
        """On rank 0: what a step gave, over the global batch."""
        self._metrics.set("piflow_loss", metrics.loss)
        self._metrics.set("piflow_grad_norm", metrics.grad_norm)
        self._metrics.set("piflow_learning_rate", metrics.lr)

    def skipped(self) -> None:
        """On rank 0: a step is left out."""
        self._metrics.add("piflow_skipped_steps_total")

    def saved(self, saved: Saved) -> None:
        """On rank 0: a checkpoint is complete."""
        self._metrics.set("piflow_checkpoint_step", saved.step)
        self._metrics.set("piflow_checkpoint_stall_seconds", saved.stall_seconds)
        self._metrics.set("piflow_checkpoint_write_seconds", saved.write_seconds)

    def teacher_checked(self, error: float, limit: float) -> None:
        """On rank 0: how far the 8-bit teacher is off."""
        self._metrics.set("piflow_fp8_teacher_error", error)
        self._metrics.set("piflow_fp8_teacher_error_limit", limit)

    def peak_memory(self) -> int | None:
        """Bytes that PyTorch has had allocated on the GPU at most; None: there is none."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device)

    def _read_memory(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._metrics.set("piflow_host_memory_peak_bytes", peak * _KIB)
        if self._device is not None:  # the allocator's own books, which lie on the host
            gpu = torch.cuda.memory_stats(self._device)
            self._metrics.set("piflow_gpu_memory_peak_bytes", gpu["allocated_bytes.all.peak"])
            self._metrics.set("piflow_gpu_memory_reserved_bytes", gpu["reserved_bytes.all.current"])

    def _add_seconds(self, part: Part, seconds: float) -> None:
        self._metrics.add("piflow_step_seconds_total", seconds, {"part": part})
