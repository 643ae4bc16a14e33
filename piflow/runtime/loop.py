"""The train loop: step, metrics, pictures, checkpoints and reasons to stop."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero
from ray.util import get_node_ip_address

from piflow import storage
from piflow.config import Recipe
from piflow.data.batch import StreamBatch
from piflow.data.stream import TrainStream
from piflow.evaluation.sheet import grid
from piflow.roles.fp8 import check_error
from piflow.runs import folder as run_folder
from piflow.runs.lease import require_owner
from piflow.runs.predicted import GIB, Measured
from piflow.runs.tracking import SystemMetrics, Tracker
from piflow.runtime.mailbox import Failure, StopReason
from piflow.runtime.stopping import Stops
from piflow.runtime.watchdog import Watchdog
from piflow.runtime.worker_metrics import WorkerMetrics
from piflow.sharding.everyone import everyone
from piflow.training.ahead import one_ahead
from piflow.training.build import Assembly
from piflow.training.checkpoint import CheckpointError, RunState, require_same_run
from piflow.training.checkpoint_writer import CheckpointSaver, restore_newest
from piflow.training.step import NonFiniteError, SkippedSteps, StepMetrics

_STOP_TEXTS = {
    StopReason.RESIZE: "the number of workers is about to change",
    StopReason.MOVE: "a machine is going away, or a worker got SIGTERM",
    StopReason.END: "the driver was told to stop",
}


class TrainLoop:
    """Steps, and what is due after each: metrics, pictures, checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        config: dict[str, Any],
        assembly: Assembly,
        tracker: Tracker,
        metrics: WorkerMetrics,
        stops: Stops,
        watchdog: Watchdog,
    ) -> None:
        self.recipe = recipe
        self.written = Recipe.model_validate(config["written"])
        self.manifest_hash: str = config["manifest_hash"]
        self.training = recipe.training
        self.assembly = assembly
        self.tracker = tracker
        self.metrics = metrics
        self.stops = stops
        self.watchdog = watchdog
        self.mailbox = config["mailbox"]
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.run_id = config["run_id"]
        tracked = recipe.tracking.system_metrics and context.get_local_rank() == 0
        self.system = SystemMetrics(_machine()) if tracked else None
        self.start = 0
        self.skipped = SkippedSteps(recipe.training)
        self.waits: list[float] = []  # of each step since the last metric point
        self.seconds: list[float] = []
        self.step_seconds = 0.0  # of the last step
        self.timed: list[float] = []  # seconds of all steps of this process but its first
        self.losses: list[float] = []  # of each step since the last checkpoint
        self.replaced: Counter[str] = Counter()  # this rank's rows, by damaged row group
        self.told: set[str] = set()  # damaged row groups of which MLflow knows
        self.owner = config["owner"]
        self.saver = CheckpointSaver(recipe.run_dir, recipe.training, self._before_seal)

    def _before_seal(self) -> None:
        """On rank 0: nothing is written for a driver that another one has replaced."""
        require_owner(self.recipe.run_dir, self.owner)
        self.tracker.keep()

    def resume(self) -> int:
        """Restore the newest good checkpoint, if there is one; returns the steps that are done.

        The run's folder alone says which: Ray Train's list ends with the driver's process, and
        knows nothing of damage.
        """
        state = restore_newest(
            self.recipe.run_dir,
            self.assembly.trainer,
            _opened,
            lambda text: self.tracker.event("damaged-checkpoint", text),
            lambda state, uri: require_same_run(state, self.written, self.manifest_hash, uri),
        )
        if state is None:
            return 0
        if self.rank == 0:
            self.tracker.event("resume", f"from step {state.step}")
        return state.step

    def run(self, start: int, stream: TrainStream) -> None:
        """Steps `start` to the recipe's last, or until all workers are asked to stop."""
        if start >= self.training.steps:
            self._leave(StopReason.NONE, start)
            return
        self.start = start
        planned = islice(stream.batches(), self.training.steps - start)
        batches = one_ahead(planned, self.assembly.bring)
        for step in range(start, self.training.steps):
            began = time.perf_counter()
            self.metrics.begin()
            batch = next(batches)
            waited = time.perf_counter() - began
            self.metrics.lap("data")
            self._count_replaced(step, batch)
            self._check_teacher(step, batch)
            self.metrics.lap("other")
            try:
                metrics = self.assembly.trainer.step(step, batch.micro_batches)
            except NonFiniteError as error:  # every rank raises it in the same step
                self._skip(step, error)
            else:
                seconds = time.perf_counter() - began
                self.waits.append(waited)
                self.seconds.append(seconds)
                self.step_seconds = seconds
                if step > start:
                    self.timed.append(seconds)
                self.losses.append(metrics.loss)
                flops = self.assembly.flops(batch.micro_batches[0])
                self.metrics.stepped(metrics, self._images(batch), flops)
                self._report(metrics, seconds, waited, stream.epoch_of(step), flops)
            done = step + 1
            self.watchdog.rearm()
            self.metrics.lap("other")
            if self.training.sample_every and done % self.training.sample_every == 0:
                self._log_pictures(done)
                self.metrics.lap("pictures")
            reason = self.stops.agreed()
            last = done == self.training.steps or reason is not StopReason.NONE
            if done % self.training.checkpoint_every == 0 or last:
                self._tell_measured()
                self._save(done)
                self.metrics.lap("checkpoint")
            self._log_saves()
            self.metrics.lap("other")
            if last:
                self._leave(StopReason.NONE if done == self.training.steps else reason, done)
                return

    def _leave(self, reason: StopReason, done: int) -> None:
        """The end, when all is saved."""
        self._finish_saves()
        if self.rank:
            return
        if reason is not StopReason.NONE:
            self.tracker.event("stop", f"{_STOP_TEXTS[reason]}; step {done} is saved")
        ray.get(self.mailbox.leave.remote(reason, done))

    def _check_teacher(self, step: int, batch: StreamBatch) -> None:
        """Measures an fp8 teacher at the start and every so many steps.

        Raises:
            TeacherPrecisionError: it is too far off; on every rank.
        """
        config, measure = self.recipe.model.fp8_teacher, self.assembly.teacher_error
        if config is None or measure is None or (step != self.start and step % config.check_every):
            return
        error = measure(batch.micro_batches[0], step)
        if self.rank == 0:
            self.tracker.log_metrics({"fp8_teacher_error": error}, step=step)
            self.metrics.teacher_checked(error, config.max_error)
        check_error(step, error, config.max_error)

    def _skip(self, step: int, error: NonFiniteError) -> None:
        """Go on as if the step's batch had not been there, or stop by raising `error`."""
        self.skipped.skip(step, error)
        if self.rank == 0:
            done = step + 1
            self.metrics.skipped()
            self.mailbox.update.remote(done, "skipped")
            self.tracker.log_metrics({"skipped_steps": self.skipped.count(step)}, step=done)
            self.tracker.event("skip", error.what)

    def _images(self, batch: StreamBatch) -> float:
        """How many this worker trains on, or its part of those that its group shares."""
        group = self.recipe.runtime.context_parallel
        return len(batch.micro_batches) * self.training.micro_batch_size / group

    def _is_logged(self, done: int) -> bool:
        return done % self.training.log_every == 0 or done in (1, self.training.steps)

    def _count_replaced(self, step: int, batch: StreamBatch) -> None:
        """Tell of damaged row groups, when metrics are due: all ranks together, rank 0 tells."""
        if self.rank % self.recipe.runtime.context_parallel == 0:  # its group reads the same rows
            self.replaced.update(batch.replaced)
        done = step + 1
        if self.training.damaged_rows == "stop" or not self._is_logged(done):
            return
        counts = everyone(dict(self.replaced))
        if self.rank == 0:
            total = sum((Counter(rank) for rank in counts), Counter())
            self.tracker.log_metrics({"replaced_rows": float(total.total())}, step=done)
            for group in sorted(total.keys() - self.told):
                self.tracker.event(
                    "damaged-rows", f"{group} can't be read, others replace its rows"
                )
            self.told |= total.keys()

    def _report(
        self, metrics: StepMetrics, seconds: float, waited: float, epoch: float, flops: int
    ) -> None:
        """To mailbox and tracker; `flops`: operations of training on one sample."""
        done = metrics.step + 1
        if self.system is not None and self._is_logged(done):
            self.mailbox.machine.remote(done, self.system.read())
        if self.rank:
            return
        self.metrics.agreed(metrics)
        speed = self.training.batch_size / seconds
        self.mailbox.update.remote(done, f"loss {metrics.loss:.4f}, {speed:.3g} samples/s")
        if not self._is_logged(done):
            return
        values = {
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "epoch": epoch,
            "samples": float(done * self.training.batch_size),
            "step_seconds": seconds,
            "samples_per_second": speed,
            "tflops_per_second": 1e-12 * self.training.batch_size * flops / seconds,
            "data_wait_seconds": waited,
            "data_wait_share": sum(self.waits) / sum(self.seconds),
            "skipped_steps": float(self.skipped.count(metrics.step)),
        }
        peak = self.metrics.peak_memory()
        if peak is not None:
            values["peak_memory_gib"] = peak / GIB
        self.waits, self.seconds = [], []
        self.tracker.log_metrics(values, step=done)

    def _tell_measured(self) -> None:
        """To the driver, which has predicted it."""
        if self.rank or not self.timed:
            return
        seconds, peak = median(self.timed), self.metrics.peak_memory()
        trained = self.assembly.trainer.trained
        self.mailbox.figures.remote(Measured(len(self.timed), seconds, trained, peak))

    def _log_pictures(self, step: int) -> None:
        """All ranks draw (a sharded forward is collective), rank 0 logs."""
        samples = self.assembly.draw_samples()
        if self.rank == 0:
            seeds = [f"seed {seed}" for seed in range(samples.pictures.shape[1])]
            sheet = grid(list(samples.pictures), samples.prompts, seeds)
            self.tracker.log_image(sheet, "samples", step)

    def _save(self, step: int) -> None:
        """Start to write a checkpoint; the step waits only for the copy to host memory.

        `ray.train.report` is a barrier that all ranks come to here, in the train thread; Ray's own
        upload thread then waits for the writer, so the report counts when the files are there. Ray
        Train gets the checkpoint's name and URI only: it keeps its notes apart from the run's
        storage, and must not depend on it.
        """
        written = self.saver.save(self.assembly.trainer, self._state(step))
        files = ray.train.get_context().get_storage()
        name = run_folder.checkpoint_name(step)
        checkpoint = ray.train.Checkpoint(
            files.build_checkpoint_path_from_name(name), files.storage_filesystem
        )

        def when_written(checkpoint: ray.train.Checkpoint, _name: str) -> ray.train.Checkpoint:
            written.result()  # an error ends the attempt; Ray Train starts the next one
            return checkpoint

        ray.train.report(
            {"step": step, "uri": run_folder.checkpoint_uri(self.recipe.run_dir, step)},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=when_written,
            delete_local_checkpoint_after_upload=False,  # it lies where it shall stay
        )

    def _state(self, step: int) -> RunState:
        """What the checkpoint after `step` steps says of the run; a new mean begins."""
        losses, self.losses = self.losses, []
        return RunState(
            step=step,
            samples=step * self.training.batch_size,
            recipe_hash=self.written.hash(),
            mlflow_run_id=self.run_id,
            recipe=self.recipe.model_dump(mode="json"),
            loss=mean(losses) if losses else None,
            identity=self.written.identity(),
            manifest_hash=self.manifest_hash,
        )

    def _log_saves(self) -> None:
        """Tell MLflow of the checkpoints that have become complete since the last call."""
        for saved in self.saver.take_finished():
            if self.rank == 0:
                values = {
                    "checkpoint_stall_seconds": saved.stall_seconds,
                    "checkpoint_write_seconds": saved.write_seconds,
                }
                self.tracker.log_metrics(values, step=saved.step)
                self.metrics.saved(saved)
                self.tracker.event("checkpoint", f"step {saved.step}")
                self.tracker.log_checkpoint(saved.step, {"piflow.recipe_hash": self.written.hash()})
                if saved.kept:
                    self.tracker.keep_checkpoints(saved.step, saved.kept)
                took = self.step_seconds + saved.stall_seconds + saved.write_seconds
                self.mailbox.save_took.remote(took)

    def give_up(self, failure: Failure) -> None:
        """Leave word that no other try can help, and end; on all ranks, in the same step.

        The word comes first. A save that fails afterwards is told, but doesn't hide it: the error
        would have Ray Train start workers again, which would come to the same step.
        """
        if self.rank == 0:
            ray.get(self.mailbox.give_up.remote(failure))
            self.tracker.event(failure.kind, failure.message)
        try:
            self._finish_saves()
        except (CheckpointError, OSError) as error:
            if self.rank == 0:
                self.tracker.event("save-failed", str(error))

    def _finish_saves(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.watchdog.rearm()
        self.saver.wait()
        self._log_saves()


def _machine() -> str:
    """This machine's name in MLflow's metrics: the same whatever ranks its workers have."""
    return os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or get_node_ip_address()


@contextmanager
def _opened(uri: str) -> Iterator[Path]:
    """A checkpoint's local path; all ranks share one object, so objects come once a machine."""
    system, path = storage.filesystem(uri)
    checkpoint = broadcast_from_rank_zero(ray.train.Checkpoint(path, filesystem=system))
    with checkpoint.as_directory() as folder:
        yield Path(folder)
