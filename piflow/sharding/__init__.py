"""Sharding strategies by name."""

from __future__ import annotations

from typing import Literal

import torch

from piflow.sharding.base import Strategy, local_shard
from piflow.sharding.fsdp import FSDPStrategy
from piflow.sharding.single import SingleStrategy

__all__ = ["FSDPStrategy", "SingleStrategy", "Strategy", "build_strategy", "local_shard"]


def build_strategy(
    name: Literal["fsdp", "single"], world_size: int, device: torch.device
) -> Strategy:
    """The recipe's strategy. One worker has nothing to shard, whatever the name.

    Raises:
        ValueError: "single" with several workers, or a process group that isn't up or is of
            another size.
    """
    if world_size == 1:
        return SingleStrategy(device)
    if name == "single":
        raise ValueError(
            f"runtime.strategy 'single' runs one worker, got {world_size}: use 'fsdp', or set "
            "runtime.num_workers to 1"
        )
    strategy = FSDPStrategy(device)
    if strategy.world_size != world_size:
        raise ValueError(
            f"expected a process group of {world_size} workers, it has {strategy.world_size}"
        )
    return strategy
