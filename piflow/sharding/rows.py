"""Tensors of which each worker has its own rows, brought together as they are.

    worker 0  rows of a │ rows of b ──┐
    worker 1  rows of a │ rows of b ──┼─ one all-gather of bytes ── a, b
    worker 2  rows of a │   padding ──┘

It is what FSDP does with parameters, for frozen tensors of any dtypes that no gradient passes. The
bytes travel while the caller computes, from `RowsOfAll.start` to `ComingRows.wait`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie in a worker's buffer."""

    start: int
    end: int
    rows: int  # of the whole tensor
    shape: torch.Size  # of one row
    dtype: torch.dtype


class RowsOfAll:
    """This worker's rows of several tensors, end to end, padded to as many as any worker has.

    Args:
        parts: this worker's rows of each; workers have them as `torch.chunk` deals them out.
        rows: of each whole tensor.
        group: the workers.
    """

    def __init__(
        self, parts: Sequence[Tensor], rows: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        self._group, self._workers = group, dist.get_world_size(group)
        self._places: list[_Place] = []
        end = 0
        for part, count in zip(parts, rows, strict=True):
            shape = part.shape[1:]
            share = -(-count // self._workers)
            start, end = end, end + share * math.prod(shape) * part.dtype.itemsize
            self._places.append(_Place(start, end, count, shape, part.dtype))
        self._own = torch.zeros(end, dtype=torch.uint8, device=parts[0].device)
        for part, place in zip(parts, self._places, strict=True):
            content = part.contiguous().flatten().view(torch.uint8)
            self._own[place.start : place.start + len(content)].copy_(content)

    @property
    def nbytes(self) -> int:
        """Of this worker's buffer."""
        return self._own.nbytes

    def start(self) -> ComingRows:
        """Sends for all workers' rows; a collective."""
        gathered = self._own.new_empty(self._workers * len(self._own))
        work = dist.all_gather_into_tensor(gathered, self._own, group=self._group, async_op=True)
        return ComingRows(gathered.view(self._workers, -1), work, self._places)


class ComingRows:
    """Rows on their way."""

    def __init__(self, gathered: Tensor, work: dist.Work, places: Sequence[_Place]) -> None:
        self._gathered = gathered
        self._work = work
        self._places = places

    def wait(self) -> list[Tensor]:
        """The whole tensors, each in memory of its own; on a GPU its stream waits, no host does."""
        self._work.wait()
        return [
            self._gathered[:, place.start : place.end]
            .reshape(-1)  # a copy, since the workers' rows lie apart
            .view(place.dtype)
            .view(-1, *place.shape)[: place.rows]
            for place in self._places
        ]
