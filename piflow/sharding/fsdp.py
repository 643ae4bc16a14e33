"""FSDP2: every parameter, gradient and optimiser state is split over all workers.

    rank 0 ─┐                       ┌─ block i's whole weights, for the time of its forward
    rank 1 ─┼─ all-gather block i ──┤  and again for its backward
    rank 2 ─┘                       └─ reduce-scatter: each rank keeps its part's mean gradient

No mixed-precision policy: it would round the float32 LoRA weights. The frozen base is kept in the
dtype that the recipe says, and one group may hold both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class FSDPStrategy:
    """See `piflow.sharding.base.Strategy`. The process group must be up (nccl or gloo).

    Raises:
        ValueError: it isn't.
    """

    def __init__(self, device: torch.device) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "FSDP needs a process group: start the workers with Ray Train or torchrun, or use "
                "runtime.strategy: single with one worker"
            )
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._mesh = init_device_mesh(device.type, (self.world_size,))
        self._modules: list[FSDPModule] = []

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Shards each block, then the rest, moving block by block to the device.

        All ranks must come with equal weights: none are broadcast. A model that doesn't fit on
        one device may come on the CPU.
        """
        for block in [m for m in module.modules() if isinstance(m, block_classes)]:
            fully_shard(block, mesh=self._mesh)
        # by default the rest would stay whole until a backward pass, which an EMA never has: its
        # next forward would then not see what the average became meanwhile
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        if not isinstance(module, FSDPModule):
            raise TypeError(f"fully_shard left a {type(module).__name__}")
        self._modules.append(module)

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Whether backward passes inside average gradients over the workers, or only add up.

        Raises:
            ValueError: called before `prepare`.
        """
        if not self._modules:
            raise ValueError("call prepare(module, block_classes) before gradient_sync")
        for module in self._modules:
            module.set_requires_gradient_sync(enabled)
        try:
            yield
        finally:
            for module in self._modules:
                module.set_requires_gradient_sync(True)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Clips to `max_norm` in place; returns the global norm before (inf: only measures)."""
        trained = list(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if math.isfinite(max_norm):
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return float(norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on rank 0's CPU, one at a time; an empty dict on the others."""
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            detached = tensor.detach()
            whole = detached.full_tensor() if isinstance(detached, DTensor) else detached
            if self.rank == 0:
                gathered[name] = whole.cpu().clone()
        return gathered
