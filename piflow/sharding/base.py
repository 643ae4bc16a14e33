"""What a sharding strategy is: how one module's training is spread over the workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Strategy(Protocol):
    """Prepares the modules; then answers for gradients and whole tensors.

    The workers' gradients are averaged. Every method is a collective: all workers call it.

    Attributes:
        rank: this worker, from 0.
        world_size: all workers.
        device: this worker's device.
    """

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Moves the module to the device and shards it in place, block by block.

        May be called for several modules; `gradient_sync` is about all of them.
        """
        ...

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Whether backward passes inside average gradients over the workers, or only add up."""
        ...

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Clips to `max_norm` in place; returns the global norm before (inf: only measures)."""
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name on rank 0; an empty dict on the others."""
        ...


def local_shard(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor, sharing its memory, without gradient history."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
