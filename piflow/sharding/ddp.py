"""Replicas: every worker has all parameters, and gradients are averaged.

    rank 0 ─┐  forward, backward, forward, backward ... on its own micro-batches
    rank 1 ─┼──────────────────────────────────────────┐
    rank 2 ─┘  one all-reduce of the summed gradients ──┘ after the step's last backward

torch's `DistributedDataParallel` hooks into one forward and one backward of one wrapped module. A
step here is many of both, by a module that plays three roles, each with the others' parameters
unused. Reducing once, from outside, needs to know nothing of that. What it gives up, communication
during the last backward, is little: with LoRA the trained weights are a few per cent of the model,
and one all-reduce ends a step of many forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.sharding.base import InPlaceStrategy, require_process_group

BUCKET_BYTES = 64 * 2**20  # gradients that are reduced at once; as much memory is needed for it


class DDPStrategy(InPlaceStrategy):
    """Replicas, as a `Strategy`. The process group must be up (nccl or gloo).

    Raises:
        ValueError: it isn't.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size = require_process_group("ddp")
        self.device = device
        self._modules: list[nn.Module] = []

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Moves the module to the device; all ranks must come with equal weights."""
        module.to(self.device)
        self._modules.append(module)

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """When enabled, averages what all backward passes since the last time added up.

        Raises:
            ValueError: called before `prepare`.
        """
        if not self._modules:
            raise ValueError("call prepare(module, block_classes) before gradient_sync")
        yield
        if enabled:
            parameters = [p for module in self._modules for p in module.parameters()]
            average_gradients([p for p in parameters if p.requires_grad], self.device)


@torch.no_grad()
def average_gradients(
    parameters: Sequence[nn.Parameter],
    device: torch.device,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """grad <- mean over the workers, in place; a collective, with equal parameters on all workers.

    A parameter that got a gradient on some workers only has zeros on the others; one that got none
    anywhere keeps None, so that an optimiser passes over it, as it does in one process.

    Args:
        bucket_bytes: gradients are reduced in groups of about this size.
    """
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in bucket])
        shaped = [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)]
        torch._foreach_copy_(bucket, shaped)


def _buckets(gradients: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most `bucket_bytes` unless one alone is larger."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > bucket_bytes or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
