"""An evaluation's pictures, drawn by workers.

    driver                                     workers, replicas or shards as in training
    Plan, RunRecord, TorchTrainer   ────▶      rank 0..W-1: the base's part, the student's weights;
    bar, signals ◀── Mailbox ── rank 0           a batch of each round, its PNG files to the run's
    figures ◀── the run's folder                 folder; rank 0 the index

A worker that dies costs the rounds that the index doesn't name yet: those pictures are drawn again.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import Any

import ray
import ray.train.torch

from piflow import storage
from piflow.config import Recipe, RuntimeConfig
from piflow.data.shared_disk import require_same_store, require_visible
from piflow.evaluation.drawing import Drawing, Plan
from piflow.roles.trio import Trio
from piflow.runs import folder as run_folder
from piflow.runs.tracking import NullTracker
from piflow.runtime.attempts import Work, done_by_attempts
from piflow.runtime.mailbox import Failure, StopReason
from piflow.runtime.progress import mailbox_with_bar
from piflow.runtime.signals import Signals
from piflow.runtime.stopping import Stops
from piflow.runtime.watchdog import Watchdog
from piflow.runtime.workers import session_with_room
from piflow.sharding import Strategy
from piflow.sharding.everyone import everyone
from piflow.training.build import prepared_trio
from piflow.training.checkpoint import STATE_FILE, load_section
from piflow.training.placement import strategy_for
from piflow.training.preflight import Run

_KEPT = "what was drawn before is kept"


def draw_on_workers(
    run: Run, plan: Plan, checkpoint: str, total: int, *, show_progress: bool
) -> None:
    """Draw the plan's pictures on `evaluation_workers` workers of the recipe.

    Args:
        run: what preflight found; its store goes to the workers.
        checkpoint: URI of the student's.
        total: pictures of the plan, those that are there among them.

    Raises:
        ValueError: model, checkpoint and recipe don't fit, or machines don't share the run's disk.
        ResourcesError, WorkersFailedError, RayLostError, StoppedError: as of training.
    """
    recipe = evaluation_recipe(run.absolute)
    with (
        session_with_room(recipe, key="evaluation.workers", encodes=False),
        mailbox_with_bar(f"{recipe.name}: pictures", total, show=show_progress) as mailbox,
        Signals(
            "stop after the pictures at hand", f"pictures at hand are lost, {_KEPT}"
        ).handled() as signals,
    ):
        config = {
            "recipe": run.absolute.model_dump(mode="json"),
            "plan": asdict(plan),
            "checkpoint": storage.absolute(checkpoint),
            "store": ray.put(run.store),
        }
        work = Work(
            evaluation_worker,
            config,
            recipe.runtime,
            total,
            lambda done: f"{done} of {total} pictures are drawn",
        )
        done_by_attempts(work, mailbox, signals, NullTracker())


def evaluation_recipe(recipe: Recipe) -> Recipe:
    """The recipe as an evaluation's workers have it: its precision, and no backward passes.

    The teacher computes in the base's own precision, since it is what is compared with.
    """
    workers = recipe.evaluation_workers
    model = recipe.model.model_copy(update={"fp8_teacher": None})
    runtime = _runtime(recipe.runtime, workers)
    return recipe.model_copy(update={"model": model, "runtime": runtime})


def _runtime(runtime: RuntimeConfig, workers: int) -> RuntimeConfig:
    """As training has it, less what serves backward passes and optimisers.

    DeepSpeed splits a base as FSDP does. Blocks that training keeps whole until their backward pass
    would stay whole for good.
    """
    shares = runtime.shard_size is not None and workers % runtime.shard_size == 0
    offloads = runtime.deepspeed is not None and runtime.deepspeed.offload_parameters == "cpu"
    strategy = runtime.strategy if runtime.strategy in ("fsdp", "ddp") else "auto"
    return runtime.model_copy(
        update={
            "num_workers": workers,
            "strategy": "fsdp" if offloads else strategy,
            "offload": "cpu" if offloads else runtime.offload,
            "deepspeed": None,
            "shard_size": runtime.shard_size if shares else None,
            "reshard_after_forward": True,
            "context_parallel": 1,
            "activation_checkpointing": "none",
            "compile": False,
        }
    )


def evaluation_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker.

    Args:
        config: `recipe` (plain values, local paths absolute), `plan` (of a `Plan`), `checkpoint`
            (URI), `store` (reference to the opened store), `mailbox` (actor handle).
    """
    mailbox = config["mailbox"]
    if ray.get(mailbox.failure.remote()) is not None:
        return  # Ray Train restarts workers whatever they failed of
    recipe = evaluation_recipe(Recipe.model_validate(config["recipe"]))
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    watchdog = Watchdog(recipe.runtime.stall_timeout)
    watchdog.rearm()
    try:
        with closing(Stops(mailbox, rank)) as stops:
            if rank == 0:
                ray.get(mailbox.join.remote(world_size))
            strategy, _ = strategy_for(recipe, world_size, ray.train.torch.get_device())
            found = _prepared_or_told(recipe, config, strategy)
            if found is not None:
                _draw(*found, strategy, mailbox, stops, watchdog)
    finally:
        watchdog.end()


def _prepared_or_told(
    recipe: Recipe, config: dict[str, Any], strategy: Strategy
) -> tuple[Drawing, Trio] | None:
    """What is drawn, and teacher and student; or None on every rank, and word for the driver.

    What doesn't fit fails again in every restart, so it ends the attempt here.
    """
    checkpoint: str = config["checkpoint"]
    found, problem = None, None
    try:
        found = _prepared(recipe, config, strategy)
    except ValueError as error:
        problem = str(error)
    problem = next((text for text in everyone(problem) if text is not None), None)
    if found is not None and problem is None:
        try:
            _load_average(found[1], checkpoint)
            return found
        except ValueError as error:  # on every rank
            problem = str(error)
    if strategy.rank == 0:
        ray.get(config["mailbox"].give_up.remote(Failure("recipe", str(problem))))
    return None


def _prepared(recipe: Recipe, config: dict[str, Any], strategy: Strategy) -> tuple[Drawing, Trio]:
    store = ray.get(config["store"])
    require_visible(storage.join(recipe.run_dir, run_folder.RECORD_FILE))
    require_visible(storage.join(config["checkpoint"], STATE_FILE))
    require_same_store(store)
    plan = Plan(**config["plan"])
    return Drawing(recipe, plan, store), prepared_trio(recipe, strategy)


def _load_average(trio: Trio, checkpoint: str) -> None:
    """Put a checkpoint's EMA into the student, shard by shard; a collective."""
    load_section(storage.local_folder(checkpoint), "ema", trio.trainable_parameters())
    trio.train(False)


def _draw(
    drawing: Drawing,
    trio: Trio,
    strategy: Strategy,
    mailbox: Any,
    stops: Stops,
    watchdog: Watchdog,
) -> None:
    """Draw until all is there, or somebody wants the workers to end."""
    done, reason = 0, StopReason.NONE

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watchdog.rearm()
        if strategy.rank == 0:
            mailbox.update.remote(done, f"{strategy.world_size} workers")

    def stop() -> bool:
        nonlocal reason
        reason = stops.agreed()
        return reason is not StopReason.NONE

    if drawing.draw(trio, strategy, advance=advance, stop=stop):
        reason = StopReason.NONE
    if strategy.rank == 0:
        ray.get(mailbox.leave.remote(reason, done))
