"""The train loop of one worker.

driver (one process)                      workers (one process a GPU, gloo or nccl among them)
recipe, MLflow run, TorchTrainer  ----->  rank 0..W-1: shard of weights, EMA, optimiser;
progress bar  <-- ProgressBoard -- rank 0   own micro-batches of each global batch (Ray Data)
MLflow        <-- metrics, pictures rank 0
run folder    <-- checkpoint shards -- all ranks, through ray.train.report
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from piflow import rundir
from piflow.assembly import Assembly, assemble
from piflow.checkpoint import RunState, load_checkpoint, save_checkpoint
from piflow.config import Recipe
from piflow.data.stream import StreamBatch, TrainStream
from piflow.sharding import Strategy, build_strategy
from piflow.step import NonFiniteError, StepMetrics
from piflow.tracking import MlflowTracker, NullTracker, Tracker


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker.

    Args:
        config: `recipe` (plain values, local paths absolute), `recipe_hash` (as it was written),
            `tracking_uri`, `run_id`, `board` (actor handle).
    """
    recipe = Recipe.model_validate(config["recipe"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    strategy = build_strategy(recipe.runtime.strategy, world_size, device)
    tracker: Tracker = NullTracker()
    if rank == 0:
        tracker = MlflowTracker(config["tracking_uri"], config["run_id"])
    assembly = _assemble_or_tell(recipe, strategy, device, tracker)
    if assembly is None:
        return
    loop = _Loop(
        recipe, config["recipe_hash"], assembly, tracker, config["board"], rank, config["run_id"]
    )
    start = loop.resume()
    stream = TrainStream(
        recipe.embed.store,
        seed=recipe.seed,
        batch_size=recipe.training.batch_size,
        micro_batch_size=recipe.training.micro_batch_size,
        rank=rank,
        world_size=world_size,
        start_sample=start * recipe.training.batch_size,
    )
    try:
        loop.run(start, stream)
    except NonFiniteError as error:  # every rank raises it in the same step
        if rank == 0:
            rundir.write_failure(recipe.run_dir, rundir.Failure("non-finite", str(error)))
            tracker.event("non-finite", str(error))


def _assemble_or_tell(
    recipe: Recipe, strategy: Strategy, device: torch.device, tracker: Tracker
) -> Assembly | None:
    """The run's models and trainer; or None on every rank, and word left for the driver.

    A recipe that doesn't fit its model fails again in every restart, so it ends the attempt here.
    Assembling communicates nothing: all ranks come to the exchange of what went wrong.
    """
    assembly, problem = None, None
    try:
        assembly = assemble(recipe, strategy, device)
    except ValueError as error:
        problem = str(error)
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text is not None), None)
    if first is None:
        return assembly
    if ray.train.get_context().get_world_rank() == 0:
        rundir.write_failure(recipe.run_dir, rundir.Failure("recipe", first))
        tracker.event("recipe", first)
    return None


class _Loop:
    """Steps, and what is due after each: metrics, pictures, checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        recipe_hash: str,
        assembly: Assembly,
        tracker: Tracker,
        board: Any,
        rank: int,
        run_id: str,
    ) -> None:
        self.recipe = recipe
        self.recipe_hash = recipe_hash
        self.training = recipe.training
        self.assembly = assembly
        self.tracker = tracker
        self.board = board
        self.rank = rank
        self.run_id = run_id

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one; returns the steps that are done."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = load_checkpoint(Path(folder), self.assembly.trainer)
        if self.rank == 0:
            self.tracker.event("resume", f"from step {state.step}")
        return state.step

    def run(self, start: int, stream: TrainStream) -> None:
        """Steps `start` to the recipe's last."""
        if start >= self.training.steps:
            return
        batches = iter(stream.batches())
        for step in range(start, self.training.steps):
            began = time.perf_counter()
            batch: StreamBatch = next(batches)
            waited = time.perf_counter() - began
            metrics = self.assembly.trainer.step(step, batch.micro_batches)
            seconds = time.perf_counter() - began
            self._report(metrics, seconds, waited, stream.epoch_of(step))
            done = step + 1
            if self.training.sample_every and done % self.training.sample_every == 0:
                self._log_pictures(done)
            if done % self.training.checkpoint_every == 0 or done == self.training.steps:
                self._save(done)

    def _report(self, metrics: StepMetrics, seconds: float, waited: float, epoch: float) -> None:
        if self.rank:
            return
        done = metrics.step + 1
        self.board.update.remote(done, f"loss {metrics.loss:.4f}")
        if done % self.training.log_every and done != 1 and done != self.training.steps:
            return
        values = {
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "epoch": epoch,
            "samples": float(done * self.training.batch_size),
            "step_seconds": seconds,
            "samples_per_second": self.training.batch_size / seconds,
            "data_wait_seconds": waited,
        }
        self.tracker.log_metrics(values, step=done)

    def _log_pictures(self, step: int) -> None:
        """All ranks draw (a sharded forward is collective), rank 0 logs."""
        picture = self.assembly.draw_samples()
        if self.rank == 0:
            self.tracker.log_image(picture, "samples", step)

    def _save(self, step: int) -> None:
        """Write this rank's shards and report them; Ray Train merges and stores them."""
        state = RunState(
            step=step,
            samples=step * self.training.batch_size,
            recipe_hash=self.recipe_hash,
            mlflow_run_id=self.run_id,
            recipe=self.recipe.model_dump(mode="json"),
        )
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="piflow-checkpoint-") as folder:
            save_checkpoint(Path(folder), self.assembly.trainer, state)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=rundir.checkpoint_name(step),
            )
        if self.rank == 0:
            self.tracker.log_metrics({"checkpoint_seconds": time.perf_counter() - began}, step=step)
            self.tracker.event("checkpoint", f"step {step}")
