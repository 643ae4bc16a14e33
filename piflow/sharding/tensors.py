"""Tensors that may be split over workers, whoever splits them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


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


@dataclass(frozen=True)
class Part:
    """What a worker holds of a tensor: consecutive values of the whole, in row-major order.

    Attributes:
        values: sharing the tensor's memory, without gradient history. Padding may follow the last.
        first: number of the first value.
        shape: of the whole tensor.
    """

    values: Tensor
    first: int
    shape: torch.Size


def part_of(tensor: Tensor) -> Part:
    """This worker's part of a whole tensor, or of one that torch shards.

    Raises:
        ValueError: it is sharded along another dimension than the first.
    """
    detached = tensor.detach()
    if not isinstance(detached, DTensor):
        return Part(detached, 0, tensor.shape)
    first = _first_row(detached) * math.prod(tensor.shape[1:])
    return Part(detached.to_local(), first, tensor.shape)


def local_shard(tensor: Tensor) -> Tensor:
    """The values of `part_of`, however the tensor is sharded."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _first_row(tensor: DTensor) -> int:
    """Number of the first row that this rank keeps, as `torch.chunk` splits each mesh dimension."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank isn't in the device mesh that its parameters are sharded over")
    first, rows = 0, tensor.shape[0]
    for place, index, size in zip(
        tensor.placements, coordinate, tensor.device_mesh.shape, strict=True
    ):
        if place.is_replicate():
            continue
        if place != Shard(0):
            raise ValueError(
                f"expected parameters sharded along their first dimension, got {place}"
            )
        share = -(-rows // size)
        skipped = min(index * share, rows)
        first, rows = first + skipped, min(share, rows - skipped)
    if rows != tensor.to_local().shape[0]:
        raise ValueError(f"expected {rows} rows on this rank, got {tensor.to_local().shape[0]}")
    return first


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clips gradients to `max_norm` in place (inf: not); returns their global norm before.

    Args:
        parameters: whole or sharded; those without gradient count 0.
    """
    trained = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if math.isfinite(max_norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)
