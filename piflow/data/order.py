"""The order of the training stream, as a pure function of store layout, seed and batch size."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from piflow.data.manifest import Bucket, RowGroup, StoreInputs

if TYPE_CHECKING:
    from numpy.typing import NDArray


WINDOW_GROUPS = 8  # row groups that are shuffled together

_BATCH_ORDER = 0  # counter word of the generator that orders batches; bucket b has b + 1


class ShardLayout(Protocol):
    """One file's row groups."""

    @property
    def path(self) -> str: ...

    @property
    def row_groups(self) -> tuple[RowGroup, ...]: ...


class StoreLayout(Protocol):
    """Where rows lie: in a store's manifest, or in the plan of a store that isn't written."""

    @property
    def inputs(self) -> StoreInputs: ...

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...

    @property
    def shards(self) -> Sequence[ShardLayout]: ...

    @property
    def num_rows(self) -> int: ...


class RowGroups:
    """A store's row groups, numbered through all shards, and the rows that they hold."""

    def __init__(self, layout: StoreLayout) -> None:
        sizes = [group.rows for shard in layout.shards for group in shard.row_groups]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.sizes: NDArray[np.int64] = np.diff(self._ends, prepend=0)

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row groups that rows are in."""
        return np.searchsorted(self._ends, rows, side="right")

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows' places in their row groups."""
        groups = self.of(rows)
        return rows - self._ends[groups] + self.sizes[groups]

    def rows(self, group: int) -> NDArray[np.int64]:
        """The rows of a row group."""
        return np.arange(self._ends[group] - self.sizes[group], self._ends[group])


def epoch_rows(layout: StoreLayout, seed: int, epoch: int, bucket: int) -> NDArray[np.int64]:
    """All row numbers of a bucket in the order of an epoch, ``(n_b,)``."""
    generator = _philox(seed, epoch, bucket + 1)
    groups = _bucket_groups(layout, bucket)
    order = _permutation(generator, len(groups))
    windows = []
    for start in range(0, len(groups), WINDOW_GROUPS):
        rows = np.concatenate([np.arange(*groups[g]) for g in order[start : start + WINDOW_GROUPS]])
        windows.append(rows[_permutation(generator, len(rows))])
    return np.concatenate(windows)


class StreamOrder:
    """Rows of any optimiser step, found without replaying the steps before it.

    Args:
        layout: the store's.
        seed: the stream's seed, 0 ≤ seed < 2^64.
        batch_size: prompts an optimiser step, over all ranks.
    """

    def __init__(self, layout: StoreLayout, seed: int, batch_size: int) -> None:
        self._layout = layout
        self.seed = seed
        self.batch_size = batch_size
        self._sizes = [bucket.rows for bucket in layout.buckets]
        # a batch lies in one or two epochs of its bucket, and the buckets take turns
        self._rows = lru_cache(2 * len(self._sizes))(self._epoch_rows)
        self._buckets = lru_cache(2)(self._epoch_buckets)

    def step(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The bucket's index and the global batch's row numbers ``(batch_size,)``."""
        bucket, start = self.place(step)
        return bucket, self.rows(bucket, start, self.batch_size)

    def place(self, step: int) -> tuple[int, int]:
        """The bucket's index and where in its sequence the global batch starts."""
        epoch = self._epoch_of_batch(step)
        buckets = self._buckets(epoch)
        position = step - self._batches_before(epoch)
        bucket = int(buckets[position])
        earlier = int((buckets[:position] == bucket).sum())
        number = self._sizes[bucket] * epoch // self.batch_size + earlier
        return bucket, number * self.batch_size

    def rows(self, bucket: int, start: int, count: int) -> NDArray[np.int64]:
        """``count`` entries of a bucket's endless sequence."""
        parts: list[NDArray[np.int64]] = []
        missing = count
        while missing:
            epoch, offset = divmod(start, self._sizes[bucket])
            part = self._rows(bucket, epoch)[offset : offset + missing]
            parts.append(part)
            start += len(part)
            missing -= len(part)
        return np.concatenate(parts)

    def bucket_rows(self, bucket: int) -> int:
        """A bucket's prompts."""
        return self._sizes[bucket]

    def groups(self, bucket: int) -> list[int]:
        """A bucket's row groups, numbered through all shards."""
        groups = (group for shard in self._layout.shards for group in shard.row_groups)
        return [number for number, group in enumerate(groups) if group.bucket == bucket]

    def _batches_before(self, epoch: int) -> int:
        return sum(rows * epoch // self.batch_size for rows in self._sizes)

    def _epoch_of_batch(self, step: int) -> int:
        """The epoch ``e`` with batches_before(e) <= step < batches_before(e + 1)."""
        # a bucket's count is at most one below rows * epoch / batch_size: an upper bound of e
        most = (step + len(self._sizes) + 1) * self.batch_size // sum(self._sizes) + 1
        return bisect.bisect_right(range(most + 1), step, key=self._batches_before) - 1

    def _epoch_buckets(self, epoch: int) -> NDArray[np.int64]:
        size = self.batch_size
        counts = [rows * (epoch + 1) // size - rows * epoch // size for rows in self._sizes]
        buckets = np.repeat(np.arange(len(counts)), counts)
        return buckets[_permutation(_philox(self.seed, epoch, _BATCH_ORDER), len(buckets))]

    def _epoch_rows(self, bucket: int, epoch: int) -> NDArray[np.int64]:
        return epoch_rows(self._layout, self.seed, epoch, bucket)


def _bucket_groups(layout: StoreLayout, bucket: int) -> list[tuple[int, int]]:
    """(first row, end) of each of a bucket's row groups."""
    groups, start = [], 0
    for shard in layout.shards:
        for group in shard.row_groups:
            if group.bucket == bucket:
                groups.append((start, start + group.rows))
            start += group.rows
    return groups


def _philox(seed: int, epoch: int, purpose: int) -> np.random.Philox:
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], dtype=np.uint64))


def _permutation(generator: np.random.Philox, size: int) -> NDArray[np.int64]:
    # NumPy promises that raw outputs never change between versions, but not `permutation`
    return np.argsort(generator.random_raw(size), kind="stable")


@dataclass(frozen=True)
class PlannedStep:
    """One rank's part of a step: its micro-batches' rows, one after the other.

    `places` are the rows' places in the bucket's sequence.
    """

    step: int
    bucket: int
    places: NDArray[np.int64]
    rows: NDArray[np.int64]


def by_length(rows: NDArray[np.int64], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """A batch's places in an order in which prompts of like length are neighbours.

    Args:
        rows: the batch's row numbers.
        lengths: of every row of the store.
    """
    return np.argsort(lengths[rows], kind="stable")
