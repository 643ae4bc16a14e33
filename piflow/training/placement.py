"""A recipe's strategy: as it says, or for `auto` replicas if they fit and shards if not.

Replicas gather no weights in forward and backward passes, so they are the faster ones wherever
memory allows; with LoRA, where little is reduced at a step's end, several times.
"""

from __future__ import annotations

import os
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
    keeping_codes,
    may_keep_codes,
    memory_of,
)
from piflow.planning.model import Model, backbone_of, model_of
from piflow.planning.passes import Passes, Passing
from piflow.sharding import DeepSpeedStrategy, FSDPStrategy, Strategy, build_strategy
from piflow.sharding.everyone import of_rank_0, rank

Sharing = Literal["fsdp", "ddp"]


def strategy_for(recipe: Recipe, world_size: int, device: torch.device) -> tuple[Strategy, str]:
    """The recipe's strategy for this worker, and one line for the log: which, and why.

    A collective: under `auto`, rank 0 decides for all, by the worker with the least free memory.

    Raises:
        ValueError: as `build_strategy`.
        OSError: the headers of the model's files can't be read (`auto`).
    """
    runtime = recipe.runtime
    name = runtime.strategy
    if name == "deepspeed":
        return _deepspeed(recipe, world_size, device)
    if world_size == 1 and not (name == "fsdp" and runtime.offload == "cpu"):
        return build_strategy("single", 1, device), "single: there is one worker"
    reason = f"{name}: runtime.strategy says so"
    if name == "auto" and recipe.model.base_weights is not None:
        kind = recipe.model.base_weights
        name, reason = "ddp", f"ddp: a base in {kind} isn't split (model.base_weights)"
    elif name == "auto":
        name, reason = _decide_together(recipe, world_size, device)
    if name != "fsdp":
        return build_strategy(name, world_size, device), reason
    strategy = build_strategy(
        name,
        world_size,
        device,
        shard_size=runtime.shard_size,
        reshard_after_forward=runtime.reshard_after_forward,
        offload=runtime.offload == "cpu",
    )
    return strategy, reason


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
    shard = Placement("fsdp", world_size, recipe.runtime.shard_size or world_size)
    replica = Placement("ddp" if world_size > 1 else "single", world_size, 1)
    whole, part = (memory_of(recipe, model, passes, placed) for placed in (replica, shard))
    return model, whole, part


def keeps_fp8_weights(recipe: Recipe, strategy: Strategy) -> bool:
    """Whether an fp8 teacher's weights are quantised once: as the recipe says, or if they fit.

    Before the model is on its device. A collective where the recipe leaves it open: rank 0 decides,
    by the worker with the least free memory.
    """
    placement, fp8 = placement_of(recipe, strategy), recipe.model.fp8_teacher
    if fp8 is None or not may_keep_codes(recipe, placement.strategy):
        return fp8 is not None and bool(fp8.keep_weights)
    free = _least_free(strategy.device, placement.world)
    chosen: bool | None = None
    if rank() == 0:
        chosen = _codes_fit(keeping_codes(recipe, True), placement, free)
    return bool(of_rank_0(chosen))


def _codes_fit(kept: Recipe, placement: Placement, free: int) -> bool:
    try:
        model, passes = measure(kept)
    except ValueError:  # a backbone that can't be counted
        return False
    return fits(memory_of(kept, model, passes, placement), free)


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


def _decide_together(recipe: Recipe, world_size: int, device: torch.device) -> tuple[Sharing, str]:
    """Rank 0's choice, on all ranks."""
    if not dist.is_initialized():
        raise ValueError(
            "runtime.strategy auto with several workers needs a process group: start them with Ray "
            "Train or torchrun"
        )
    smallest = _least_free(device, world_size)
    chosen = _measure_and_choose(recipe, smallest) if rank() == 0 else None
    chosen = of_rank_0(chosen)
    if chosen is None:
        raise ValueError("rank 0 sent no choice of a strategy: all ranks must call strategy_for")
    return chosen


def _measure_and_choose(recipe: Recipe, free: int) -> tuple[Sharing, str]:
    try:
        _, whole, part = replica_and_shard(recipe, dist.get_world_size())
    except ValueError as error:  # loading the model will say the same, and end the run properly
        return "fsdp", f"fsdp: the model can't be measured: {error}"
    name, reason = choose(whole, free)
    if name == "fsdp":
        reason = f"{reason}; a worker's shard and work are estimated at {part}"
    return name, reason
