"""The train loop of one worker.

driver (one process)                      workers (one process a GPU, gloo or nccl among them)
recipe, MLflow run, TorchTrainer  ----->  rank 0..W-1: shard of weights, EMA, optimiser;
progress bar, signals <-- Mailbox -- rank 0  own micro-batches of each global batch (Ray Data)
MLflow        <-- metrics, pictures rank 0
run folder    <-- checkpoint shards -- all ranks, behind the steps; ray.train.report says when
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from piflow.config import Recipe, find_family
from piflow.data.blocks import Reader
from piflow.data.online import EncodedReader, start_encoder
from piflow.data.ray_reader import RayReader
from piflow.data.reader import PromptStore
from piflow.data.shared_disk import require_same_store, require_shared
from piflow.data.stream import TrainStream
from piflow.roles.fp8 import TeacherPrecisionError
from piflow.runs.tracking import MlflowTracker, NullTracker, Tracker
from piflow.runtime.loop import TrainLoop
from piflow.runtime.mailbox import Failure
from piflow.runtime.stopping import Stops
from piflow.runtime.watchdog import Watchdog
from piflow.runtime.worker_metrics import WorkerMetrics
from piflow.sharding.everyone import everyone
from piflow.training.build import Assembly, assemble
from piflow.training.checkpoint import ForeignCheckpointError
from piflow.training.placement import Placed, strategy_for
from piflow.training.prediction import workers_of
from piflow.training.step import NonFiniteError

_KINDS: dict[type[Exception], Literal["recipe", "non-finite", "fp8-teacher"]] = {
    ForeignCheckpointError: "recipe",
    NonFiniteError: "non-finite",
    TeacherPrecisionError: "fp8-teacher",
}


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker.

    Args:
        config: `recipe` (plain values, local paths absolute), `written` (the recipe as it was
            written, which decides whose a checkpoint is), `manifest_hash` (of the run's store),
            `tracking_uri`, `run_id`, `store` (reference to the opened store), `mailbox` (actor
            handle), `owner` (the driver that may write).
    """
    if ray.get(config["mailbox"].failure.remote()) is not None:
        return  # Ray Train restarts workers whatever they failed of
    recipe = Recipe.model_validate(config["recipe"])
    store: PromptStore = ray.get(config["store"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    with (
        _watchdog(recipe) as watchdog,
        _stops(config["mailbox"], rank) as stops,
        _tracking(recipe, config, rank) as tracker,
    ):
        reason = ""
        if rank == 0:
            before = ray.get(config["mailbox"].join.remote(world_size))
            reason, told = _start_event(before, world_size)
            tracker.event(reason, told)
        placed = strategy_for(recipe, world_size, device)
        tracker.event("strategy", "\n".join(placed.reasons))
        assembly = _assemble_or_tell(placed, store, device, config, tracker)
        if assembly is None:
            return
        tracker.event("attention", assembly.attention)
        if assembly.coded is not None:
            tracker.event("base_weights", str(assembly.coded))
        exported = WorkerMetrics(recipe.name, rank, recipe.runtime.peak_tflops, device)
        loop = TrainLoop(recipe, config, assembly, tracker, exported, stops, watchdog)
        try:
            start = loop.resume()
            if rank == 0:
                local = context.get_local_world_size()
                config["mailbox"].figures.remote(workers_of(placed, device, local, start))
            tracker.log_start(start, world_size, reason)
            loop.run(start, _stream(recipe, store, config["store"], start))
        except tuple(_KINDS) as error:  # every rank, in the same step
            loop.give_up(Failure(_KINDS[type(error)], str(error)))


@contextmanager
def _watchdog(recipe: Recipe) -> Iterator[Watchdog]:
    """A watchdog that is armed until the block ends."""
    watchdog = Watchdog(recipe.runtime.stall_timeout)
    watchdog.rearm()
    try:
        yield watchdog
    finally:
        watchdog.end()


@contextmanager
def _stops(mailbox: Any, rank: int) -> Iterator[Stops]:
    stops = Stops(mailbox, rank)
    try:
        yield stops
    finally:
        stops.close()


def _start_event(before: int, world_size: int) -> tuple[str, str]:
    """Name and text of the event that workers start, after `before` others of this driver."""
    if before == 0:
        return "start", f"{world_size} workers"
    if before == world_size:
        return "restart", f"{world_size} workers"
    return "resize", f"from {before} to {world_size} workers"


@contextmanager
def _tracking(recipe: Recipe, config: dict[str, Any], rank: int) -> Iterator[Tracker]:
    """Rank 0's tracker; what MLflow didn't take when the block ends is kept in the run's folder."""
    tracker: Tracker = NullTracker()
    if rank == 0:
        tracker = MlflowTracker(config["tracking_uri"], config["run_id"], recipe.run_dir)
    try:
        yield tracker
    finally:
        tracker.close()


def _stream(recipe: Recipe, store: PromptStore, reference: Any, start: int) -> TrainStream:
    """This rank's prompts from step `start` on; `reference` is Ray's to the store."""
    context = ray.train.get_context()
    return TrainStream(
        store,
        seed=recipe.seed,
        batch_size=recipe.training.batch_size,
        micro_batch_size=recipe.training.micro_batch_size,
        rank=context.get_world_rank() // recipe.runtime.context_parallel,
        world_size=context.get_world_size() // recipe.runtime.context_parallel,
        start_sample=start * recipe.training.batch_size,
        reader=_reader(recipe, reference, start),
        with_latents=recipe.objective.pictures == "store",
        by_length=find_family(recipe.model.family).masks_text,
    )


def _reader(recipe: Recipe, reference: Any, start: int) -> Reader:
    """Reads the store; in online mode, from an actor that rank 0 starts and that serves all."""
    if recipe.embed.mode == "store" or start >= recipe.training.steps:
        return RayReader()
    context = ray.train.get_context()
    mine = None
    if context.get_world_rank() == 0:
        mine = start_encoder(recipe, reference, start, context.get_world_size())
    return EncodedReader(broadcast_from_rank_zero(mine), range(start, recipe.training.steps))


def _assemble_or_tell(
    placed: Placed,
    store: PromptStore,
    device: torch.device,
    config: dict[str, Any],
    tracker: Tracker,
) -> Assembly | None:
    """The run's models and trainer; or None on every rank, and word left for the driver.

    A recipe that doesn't fit its model fails again in every restart, so it ends the attempt here,
    and so does a disk that this machine doesn't share with the driver's.
    What doesn't fit shows before anything is communicated: all ranks come to the exchange of what
    went wrong.
    """
    assembly, problem = None, None
    try:
        require_shared(placed.recipe.run_dir, config["owner"])
        require_same_store(store)
        assembly = assemble(placed.recipe, store, placed.strategy, device)
    except ValueError as error:
        problem = str(error)
    first = next((text for text in everyone(problem) if text is not None), None)
    if first is None:
        return assembly
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(config["mailbox"].give_up.remote(Failure("recipe", first)))
        tracker.event("recipe", first)
    return None
