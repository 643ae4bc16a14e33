"""An evaluation's pictures, drawn by workers.

    driver                                     workers, replicas or shards as in training
    Plan, RunRecord, TorchTrainer   ────▶      rank 0..W-1: the base's part, the student's weights;
    bar, signals ◀── Mailbox ── rank 0           a batch of each round, its PNG files to the run's
    figures ◀── the run's folder                 folder; rank 0 the index

A worker that dies costs the rounds that the index doesn't name yet: those pictures are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any, TypeVar

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

Result = TypeVar("Result")
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
            placed = strategy_for(recipe, world_size, ray.train.torch.get_device())
            work = _Work(config, placed.strategy, mailbox, stops, watchdog)
            work.do(recipe)
    finally:
        watchdog.end()


class _Work:
    """What one worker does: other people's models, then teacher and student.

    Args:
        config: as of `evaluation_worker`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        strategy: Strategy,
        mailbox: Any,
        stops: Stops,
        watchdog: Watchdog,
    ) -> None:
        self._config, self._strategy, self._mailbox = config, strategy, mailbox
        self._stops, self._watchdog = stops, watchdog
        self._done, self._reason = 0, StopReason.NONE

    def do(self, recipe: Recipe) -> None:
        """Draw until all is there, or somebody wants the workers to end."""
        opened = self._agreed(lambda: _opened(recipe, self._config))
        if opened is None:
            return
        goes_on = self._agreed(lambda: opened.draw_others(self._strategy, **self._callbacks))
        if goes_on is None:
            return
        if goes_on and not opened.rest_is_drawn(self._strategy, self._advance):
            trio = self._agreed(lambda: prepared_trio(recipe, self._strategy))
            if trio is None or self._agreed(lambda: self._load_average(trio)) is None:
                return
            goes_on = opened.draw(trio, self._strategy, **self._callbacks)
        if goes_on:
            self._reason = StopReason.NONE
        if self._strategy.rank == 0:
            ray.get(self._mailbox.leave.remote(self._reason, self._done))

    def _agreed(self, step: Callable[[], Result]) -> Result | None:
        """What the step returns; or None on every rank, and word for the driver.

        What doesn't fit fails again in every restart, so it ends the attempt here. A step whose
        parts are collectives fails on every rank or on none.
        """
        found, problem = None, None
        try:
            found = step()
        except ValueError as error:
            problem = str(error)
        problem = next((text for text in everyone(problem) if text is not None), None)
        if problem is None:
            return found
        if self._strategy.rank == 0:
            ray.get(self._mailbox.give_up.remote(Failure("recipe", problem)))
        return None

    def _load_average(self, trio: Trio) -> bool:
        """Put a checkpoint's EMA into the student, shard by shard; a collective."""
        checkpoint: str = self._config["checkpoint"]
        load_section(storage.local_folder(checkpoint), "ema", trio.trainable_parameters())
        trio.train(False)
        return True

    @property
    def _callbacks(self) -> dict[str, Any]:
        return {"advance": self._advance, "stop": self._stop}

    def _advance(self, count: int) -> None:
        self._done += count
        self._watchdog.rearm()
        if self._strategy.rank == 0:
            self._mailbox.update.remote(self._done, f"{self._strategy.world_size} workers")

    def _stop(self) -> bool:
        self._reason = self._stops.agreed()
        return self._reason is not StopReason.NONE


def _opened(recipe: Recipe, config: dict[str, Any]) -> Drawing:
    store = ray.get(config["store"])
    require_visible(storage.join(recipe.run_dir, run_folder.RECORD_FILE))
    require_visible(storage.join(config["checkpoint"], STATE_FILE))
    require_same_store(store)
    return Drawing(recipe, Plan(**config["plan"]), store)
