"""What a sharding strategy is: how one module's training is spread over the workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
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


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """`Strategy.clip_grad_norm` of whole or sharded parameters; those without gradient count 0."""
    trained = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if math.isfinite(max_norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def gather(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """`Strategy.gather` of whole or sharded tensors, one at a time."""
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        detached = tensor.detach()
        whole = detached.full_tensor() if isinstance(detached, DTensor) else detached
        if rank == 0:
            gathered[name] = whole.cpu().clone()
    return gathered


def require_process_group(strategy: str) -> tuple[int, int]:
    """This worker's rank and the number of workers.

    Raises:
        ValueError: no process group is up.
    """
    if not dist.is_initialized():
        raise ValueError(
            f"runtime.strategy {strategy} needs a process group: start the workers with Ray Train "
            "or torchrun, or use runtime.strategy: single with one worker"
        )
    return dist.get_rank(), dist.get_world_size()
