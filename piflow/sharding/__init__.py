"""How one module's training is spread over workers: FSDP2 and HSDP, DDP, DeepSpeed, one device.

A strategy is a small contract beside the model (`base.py`), which it shards in place.
`weights.py` reads a base's weights from their files into the shards. Nothing here knows a
backbone; `piflow.training.placement` picks a strategy for a recipe.

May import the runs, the configuration and the storage.
"""

from __future__ import annotations

from typing import Literal

import torch

from piflow.config import DeepSpeedConfig
from piflow.sharding.base import Strategy
from piflow.sharding.ddp import DDPStrategy
from piflow.sharding.deepspeed import DeepSpeedStrategy
from piflow.sharding.fsdp import FSDPStrategy
from piflow.sharding.single import SingleStrategy

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "SingleStrategy",
    "Strategy",
    "build_strategy",
]


def build_strategy(
    name: Literal["fsdp", "ddp", "deepspeed", "single"],
    world_size: int,
    device: torch.device,
    *,
    shard_size: int | None = None,
    reshard_after_forward: bool = True,
    offload: bool = False,
    deepspeed: DeepSpeedConfig | None = None,
) -> Strategy:
    """A strategy. One worker has nobody to share with, whatever the name; it may offload.

    Args:
        shard_size, reshard_after_forward, offload: of "fsdp" alone, see `FSDPStrategy`.
        deepspeed: of "deepspeed" alone; None: its defaults.

    Raises:
        ValueError: "single" with several workers, a `shard_size` that doesn't divide them, or a
            process group that isn't up or is of another size.
    """
    if name == "deepspeed":
        offloads = deepspeed is not None and deepspeed.offloads
    else:
        offloads = name == "fsdp" and offload
    if world_size == 1 and not offloads:
        return SingleStrategy(device)
    if name == "single":
        raise ValueError(
            f"runtime.strategy 'single' runs one worker, got {world_size}: use another one, or "
            "set runtime.num_workers to 1"
        )
    strategy: Strategy
    if name == "ddp":
        strategy = DDPStrategy(device)
    elif name == "deepspeed":
        strategy = DeepSpeedStrategy(device, deepspeed or DeepSpeedConfig())
    else:
        strategy = FSDPStrategy(
            device,
            shard_size=shard_size,
            reshard_after_forward=reshard_after_forward,
            offload=offload,
        )
    if strategy.world_size != world_size:
        raise ValueError(
            f"expected a process group of {world_size} workers, it has {strategy.world_size}"
        )
    return strategy
