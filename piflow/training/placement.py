"""A recipe's strategy: as it says, or for `auto` replicas if they fit and shards if not.

What else the recipe leaves to memory is decided with it (`piflow.planning.settling`), anew whenever
workers start: their number decides what fits.

Replicas gather no weights in forward and backward passes, so they are the faster ones wherever
memory allows; with LoRA, where little is reduced at a step's end, several times.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist

from piflow.config import DeepSpeedConfig, Recipe
from piflow.planning.memory import (
    GIB,
    SAFE_SHARE,
    SHARDED,
    Memory,
    Placement,
    StrategyName,
    fits,
    keeps_codes,
    may_keep_codes,
    memory_of,
    reshards,
)
from piflow.planning.model import Model, backbone_of, model_of
from piflow.planning.passes import Passes, Passing
from piflow.planning.settling import Settled, is_open, settle, without_room
from piflow.sharding import DeepSpeedStrategy, FSDPStrategy, Strategy, build_strategy
from piflow.sharding.everyone import of_rank_0, rank

Sharing = Literal["fsdp", "ddp"]


@dataclass(frozen=True)
class Placed:
    """How a worker trains.

    Attributes:
        recipe: with what it leaves open to memory decided, the same on all workers.
        placement: the strategy as the planner calls it.
        reasons: lines for the log: which strategy and why, and what else was decided.
    """

    strategy: Strategy
    recipe: Recipe
    placement: Placement
    reasons: tuple[str, ...]


def strategy_for(recipe: Recipe, world_size: int, device: torch.device) -> Placed:
    """The recipe's strategy for this worker, before its model is on the device.

    A collective: what the recipe leaves open rank 0 decides for all, by the worker with the least
    free memory.

    Raises:
        ValueError: as `build_strategy`.
        OSError: the headers of the model's files can't be read (`auto`).
    """
    runtime, counted = recipe.runtime, _Counted(recipe)
    name = runtime.strategy
    if name == "deepspeed":
        return _settled(recipe, *_deepspeed(recipe, world_size, device), counted)
    if world_size == 1 and not (name == "fsdp" and runtime.offload == "cpu"):
        single = build_strategy("single", 1, device)
        return _settled(recipe, single, "single: there is one worker", counted)
    reason = f"{name}: runtime.strategy says so"
    if name == "auto" and recipe.model.base_weights is not None:
        kind = recipe.model.base_weights
        name, reason = "ddp", f"ddp: a base in {kind} isn't split (model.base_weights)"
    elif name == "auto":
        name, reason = _decide_together(recipe, world_size, device, counted)
    if name != "fsdp":
        return _settled(recipe, build_strategy(name, world_size, device), reason, counted)
    placement = Placement("fsdp", world_size, runtime.shard_size or world_size)
    settled = _settle_together(recipe, placement, device, counted)
    strategy = build_strategy(
        name,
        world_size,
        device,
        shard_size=runtime.shard_size,
        reshard_after_forward=reshards(settled.recipe),
        offload=runtime.offload == "cpu",
    )
    return Placed(strategy, settled.recipe, placement, (reason, *settled.reasons))


def _settled(recipe: Recipe, strategy: Strategy, reason: str, counted: _Counted) -> Placed:
    placement = placement_of(recipe, strategy)
    settled = _settle_together(recipe, placement, strategy.device, counted)
    return Placed(strategy, settled.recipe, placement, (reason, *settled.reasons))


class _Counted:
    """What `measure` finds, when it is first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @cached_property
    def found(self) -> tuple[Model, Passes]:
        return measure(self._recipe)


def _settle_together(
    recipe: Recipe, placement: Placement, device: torch.device, counted: _Counted
) -> Settled:
    """Rank 0's decisions, on all ranks; nothing is said or measured where nothing is open."""
    if not is_open(recipe, placement.strategy):
        return Settled(recipe)
    free = _least_free(device, placement.world)
    chosen = None
    if rank() == 0:
        try:
            chosen = settle(recipe, *counted.found, placement, free)
        except Exception as error:  # a run that can do without the estimate doesn't end by it
            why = f"the model can't be measured: {error}"
            chosen = without_room(recipe, placement.strategy, why)
    chosen = of_rank_0(chosen)
    if chosen is None:
        raise ValueError("rank 0 sent no decisions: all ranks must call strategy_for")
    return chosen


def _deepspeed(recipe: Recipe, world_size: int, device: torch.device) -> tuple[Strategy, str]:
    options = recipe.runtime.deepspeed or DeepSpeedConfig()
    strategy = build_strategy("deepspeed", world_size, device, deepspeed=options)
    if not isinstance(strategy, DeepSpeedStrategy):
        return strategy, "single: there is one worker, with nothing to offload"
    streams = strategy.splits_frozen and recipe.lora is not None
    loads = "each worker reads its part of the base" if streams else "each worker reads all weights"
    return strategy, f"deepspeed: runtime.strategy says so; ZeRO stage {options.stage}: {loads}"


def choose(needed: Memory, free: int) -> tuple[Sharing, str]:
    """Replicas or shards, and why, for workers that have at least `free` bytes each.

    Args:
        needed: of a replica.
    """
    name: Sharing = "ddp" if fits(needed, free) else "fsdp"
    relation = "fits" if name == "ddp" else "doesn't fit"
    return name, (
        f"{name}: a whole replica, estimated at {needed}, {relation} in {SAFE_SHARE:.0%} of the "
        f"{free / GIB:.2f} GiB that the smallest worker has"
    )


def measure(recipe: Recipe) -> tuple[Model, Passes]:
    """The recipe's model and passes as `piflow plan` counts them, from its config.json.

    Raises:
        ValueError: a folder that isn't the family's model, or a LoRA target without a match.
    """
    backbone, source = backbone_of(recipe)
    model = model_of(recipe, backbone, source)
    return model, Passing(recipe, backbone).measure(recipe.runtime.activation_checkpointing)


def replica_and_shard(recipe: Recipe, world_size: int) -> tuple[Model, Memory, Memory]:
    """The model, and what a worker of so many needs with all of it and with a part.

    Raises:
        ValueError: as `measure`.
    """
    model, passes = measure(recipe)
    return model, *_whole_and_part(recipe, world_size, model, passes)


def _whole_and_part(
    recipe: Recipe, world_size: int, model: Model, passes: Passes
) -> tuple[Memory, Memory]:
    shard = Placement("fsdp", world_size, recipe.runtime.shard_size or world_size)
    replica = Placement("ddp" if world_size > 1 else "single", world_size, 1)
    whole, part = (memory_of(recipe, model, passes, placed) for placed in (replica, shard))
    return whole, part


def keeps_fp8_weights(recipe: Recipe, strategy: Strategy) -> bool:
    """Whether an fp8 teacher's weights are quantised once: as the recipe says, or if they fit.

    Before the model is on its device. A collective where the recipe leaves it open, as one that
    `strategy_for` hasn't decided does.
    """
    if recipe.model.fp8_teacher is None:
        return False
    placement = placement_of(recipe, strategy)
    if may_keep_codes(recipe, placement.strategy):
        recipe = _settle_together(recipe, placement, strategy.device, _Counted(recipe)).recipe
    return keeps_codes(recipe)


def placement_of(recipe: Recipe, strategy: Strategy) -> Placement:
    """How the planner describes a recipe's strategy."""
    world = strategy.world_size
    if isinstance(strategy, DeepSpeedStrategy):
        stages: dict[int, StrategyName] = {1: "zero1", 2: "zero2", 3: "zero3"}
        name = stages[strategy.config.stage]
        return Placement(name, world, world if name in SHARDED else 1)
    if isinstance(strategy, FSDPStrategy):
        return Placement("fsdp", world, recipe.runtime.shard_size or world)
    return Placement("ddp" if world > 1 else "single", world, 1)


def _least_free(device: torch.device, world_size: int) -> int:
    free = torch.tensor(free_bytes(device, world_size), device=device)
    if world_size > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return int(free)


def free_bytes(device: torch.device, world_size: int) -> int:
    """Free memory of a worker's GPU; on the CPU its part of this machine's memory.

    On the CPU all workers are taken to be on this machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size


def _decide_together(
    recipe: Recipe, world_size: int, device: torch.device, counted: _Counted
) -> tuple[Sharing, str]:
    """Rank 0's choice, on all ranks."""
    if not dist.is_initialized():
        raise ValueError(
            "runtime.strategy auto with several workers needs a process group: start them with Ray "
            "Train or torchrun"
        )
    smallest = _least_free(device, world_size)
    chosen = _measure_and_choose(recipe, smallest, counted) if rank() == 0 else None
    chosen = of_rank_0(chosen)
    if chosen is None:
        raise ValueError("rank 0 sent no choice of a strategy: all ranks must call strategy_for")
    return chosen


def _measure_and_choose(recipe: Recipe, free: int, counted: _Counted) -> tuple[Sharing, str]:
    try:
        whole, part = _whole_and_part(recipe, dist.get_world_size(), *counted.found)
    except ValueError as error:  # loading the model will say the same, and end the run properly
        return "fsdp", f"fsdp: the model can't be measured: {error}"
    name, reason = choose(whole, free)
    if name == "fsdp":
        reason = f"{reason}; a worker's shard and work are estimated at {part}"
    return name, reason
