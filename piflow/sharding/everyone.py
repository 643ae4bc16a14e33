"""What the workers of a process group tell one another; one process alone hears itself.

Every function is a collective: all workers of the group call it in the same order.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def everyone(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """All workers' values, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Value] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def of_rank_0(value: Value) -> Value:
    """The value that rank 0 has; what the others bring doesn't count."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum of all workers' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0
