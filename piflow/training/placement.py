"""A recipe's strategy: as it says, or for `auto` replicas if they fit and shards if not.

Replicas gather no weights in forward and backward passes, so they are the faster ones wherever
memory allows; with LoRA, where little is reduced at a step's end, several times.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
import torch.distributed as dist

from piflow.backbones.flux.fresh import fresh_backbone
from piflow.config import DeepSpeedConfig, FlowMatchingConfig, LoRAConfig, Recipe
from piflow.planning.memory import (
    GIB,
    SAFE_SHARE,
    ModelSize,
    ReplicaBytes,
    fits,
    replica_bytes,
    shard_bytes,
)
from piflow.sharding import DeepSpeedStrategy, Strategy, build_strategy
from piflow.sharding.everyone import of_rank_0, rank
from piflow.sharding.weights import parameters_on_meta
from piflow.training.build import build_empty_trio

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
    if name == "auto":
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


def choose(needed: ReplicaBytes, free: int) -> tuple[Sharing, str]:
    """Replicas or shards, and why, for workers that have at least `free` bytes each."""
    name: Sharing = "ddp" if fits(needed, free) else "fsdp"
    relation = "fits" if name == "ddp" else "doesn't fit"
    return name, (
        f"{name}: a whole replica, estimated at {needed}, {relation} in {SAFE_SHARE:.0%} of the "
        f"{free / GIB:.2f} GiB that the smallest worker has"
    )


def measure(recipe: Recipe) -> ModelSize:
    """Sizes of the recipe's model, read from its config.json and its files' headers.

    With full training, the output layer, which the policy's head replaces, is counted as trained.

    Raises:
        ValueError: a folder that isn't the family's model, or a LoRA target without a match.
    """
    if isinstance(recipe.objective, FlowMatchingConfig):
        with parameters_on_meta(torch.float32):
            fresh = fresh_backbone(recipe.model, recipe.seed)
        blocks = sum(isinstance(m, fresh.block_classes) for m in fresh.module.modules())
        return ModelSize(0, sum(p.numel() for p in fresh.module.parameters()), blocks, fresh.width)
    # An adapter's size is proportional to its rank: of rank 1 it takes no memory worth mentioning
    lora = recipe.lora or LoRAConfig()
    narrow = recipe.model_copy(update={"lora": lora.model_copy(update={"rank": 1})})
    trio, _ = build_empty_trio(narrow)
    backbone = trio.backbone
    own = list(trio.trainable_parameters().values())
    copies = {id(parameter) for parameter in [*own, *trio.ema_parameters().values()]}
    base = [p for p in backbone.module.parameters() if id(p) not in copies]
    head = sum(p.numel() for p in trio.head.parameters())
    if recipe.lora is None:
        trained = sum(p.numel() for p in base)
    else:
        trained = (sum(p.numel() for p in own) - head) * recipe.lora.rank
    return ModelSize(
        frozen_bytes=sum(p.nbytes for p in base),
        trained=trained + head,
        blocks=sum(isinstance(m, backbone.block_classes) for m in backbone.module.modules()),
        width=backbone.width,
        largest=max(p.numel() for p in base),
    )


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
    smallest = torch.tensor(free_bytes(device, world_size), device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    chosen = _measure_and_choose(recipe, int(smallest)) if rank() == 0 else None
    chosen = of_rank_0(chosen)
    if chosen is None:
        raise ValueError("rank 0 sent no choice of a strategy: all ranks must call strategy_for")
    return chosen


def _measure_and_choose(recipe: Recipe, free: int) -> tuple[Sharing, str]:
    try:
        size = measure(recipe)
        name, reason = choose(replica_bytes(recipe, size), free)
        if name == "fsdp":
            shard = shard_bytes(recipe, size, dist.get_world_size())
            reason = f"{reason}; a worker's shard and work are estimated at {shard}"
        return name, reason
    except ValueError as error:  # loading the model will say the same, and end the run properly
        return "fsdp", f"fsdp: the model can't be measured: {error}"
