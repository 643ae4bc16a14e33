"""Tensors that may be split over workers, whoever splits them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class SplitTensor(Protocol):
    """A tensor whose parts the workers hold in a form that torch's own checkpoints can't name.

    Attributes:
        shape: of the whole tensor.
        dtype: of its values.
    """

    shape: torch.Size
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """All of it, on the workers' devices; a collective. Copy it before anything trains on."""
        ...

    def fill(self, whole: Tensor) -> None:
        """Sets this worker's part from all of it; no collective."""
        ...


def local_shard(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor, sharing its memory, without gradient history."""
    detached = tensor.detach()
    if isinstance(detached, DTensor):
        return detached.to_local()
    if is_partitioned(tensor):
        part: Tensor = tensor.ds_tensor.detach()
        return part
    return detached


def is_partitioned(tensor: Any) -> TypeGuard[Any]:
    """Whether DeepSpeed's stage 3 has split it.

    The parameter itself is empty then. This worker's part hangs on it as `ds_tensor`, flat, of
    equal size on all workers; the last one's end is padding.
    """
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Tensor) -> torch.Size:
    """A tensor's shape, also where DeepSpeed has only left its parts."""
    shape: torch.Size = tensor.ds_shape if is_partitioned(tensor) else tensor.shape
    return shape


def first_value(parameter: Any) -> int:
    """Number of the first value, in row-major order, of this worker's part (`is_partitioned`)."""
    first: int = parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
    return first


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """`InPlaceStrategy.clip_grad_norm`, of whole or sharded parameters.

    Those without gradient count 0.
    """
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
