"""What a rank's readers are asked for, and the reading of it from files.

::

    TrainStream --- StreamPlan: steps, row numbers ---> Reader: `LocalReader` in the rank's threads,
                <-- steps, decoded rows, in order -----         `RayReader`, or `EncodedReader`
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from piflow.data.background import ahead
from piflow.data.manifest import StoreError
from piflow.data.order import WINDOW_GROUPS, PlannedStep, RowGroups, StreamOrder, by_length
from piflow.data.reader import EmbeddingStore, PromptStore, RowReader
from piflow.data.rows import decoded, schema_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


REPLACED = "replaced"  # column: the damaged row group in whose place a row came, or null

_BLOCK_STEPS = 16  # optimiser steps whose rows are read together, at most

_BLOCK_BYTES = 16 * 2**20  # that their rows take on disk, if they are more than one step


@dataclass(frozen=True)
class StreamPlan:
    """One rank's rows of every step from the first one on, without end.

    `mine` are the rank's places in a global batch, `lengths` those of all rows' prompts if a
    batch is to be ordered by them before it is dealt out.
    """

    store: PromptStore
    order: StreamOrder
    mine: NDArray[np.int64]
    first_step: int
    with_latents: bool = False
    lengths: NDArray[np.int32] | None = None

    def steps(self) -> Iterator[PlannedStep]:
        """The steps, one after the other."""
        for step in count(self.first_step):
            bucket, start = self.order.place(step)
            rows = self.order.rows(bucket, start, self.order.batch_size)
            mine = self.mine if self.lengths is None else by_length(rows, self.lengths)[self.mine]
            yield PlannedStep(step, bucket, start + mine, rows[mine])


class Reader(Protocol):
    """A way of reading the training stream's rows."""

    def read(self, plan: StreamPlan) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """Each step with its rows, as `rows.decoded` gives them, and the column ``replaced``.

        All readers give the same numbers, to the bit.
        """
        ...


@dataclass(frozen=True)
class Block:
    """Steps whose rows are read together; `following` are the rows that come next."""

    steps: tuple[PlannedStep, ...]
    following: NDArray[np.int64]


def stored(plan: StreamPlan) -> EmbeddingStore:
    """The plan's store, whose files are there to be read.

    Raises:
        TypeError: it is only planned.
    """
    if not isinstance(plan.store, EmbeddingStore):
        raise TypeError(f"the rows of {plan.store.uri} are not in files; use an EncodedReader")
    return plan.store


def columns(plan: StreamPlan) -> list[str] | None:
    """What is read of a row; None: everything."""
    if plan.with_latents:
        return None
    inputs = plan.store.layout.inputs
    return schema_of(None, inputs.conditions, inputs.negative_prompt is not None).names


def blocks(plan: StreamPlan) -> Iterator[Block]:
    """The plan in blocks; a window of row groups is read ahead of the one in use."""
    manifest = stored(plan).manifest
    largest = int(RowGroups(manifest).sizes.max())  # rows_per_group may be far above it
    window = max(1, WINDOW_GROUPS * largest // plan.order.batch_size)
    row_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.num_rows
    most = int(_BLOCK_BYTES / (row_bytes * len(plan.mine)))
    size = max(1, min(_BLOCK_STEPS, window // 2, most))  # in steps, as the window is
    steps, upcoming = plan.steps(), deque[PlannedStep]()
    while True:
        upcoming.extend(islice(steps, size + window - len(upcoming)))
        block = tuple(upcoming.popleft() for _ in range(size))
        yield Block(block, np.concatenate([step.rows for step in upcoming]))


def by_step(
    read: Iterable[tuple[Block, pa.Table]],
) -> Iterator[tuple[PlannedStep, pa.Table]]:
    """Cut the rows of blocks into those of their steps."""
    for block, table in read:
        start = 0
        for step in block.steps:
            yield step, table.slice(start, len(step.rows))
            start += len(step.rows)


class LocalReader:
    """Reads a store's files in threads of the rank's own process."""

    def read(self, plan: StreamPlan) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """Each step with its rows, decoded in a thread ahead of the steps."""
        inputs = plan.store.layout.inputs
        yield from ahead(lambda pair: (pair[0], decoded(pair[1], inputs)), self.undecoded(plan))

    def undecoded(self, plan: StreamPlan) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """Each step with its rows as they lie on disk."""
        rows = RowReader(stored(plan), columns(plan))
        reader = BlockReader(stored(plan), plan.order, rows)
        try:
            read = ahead(lambda block: (block, reader.read(block)), blocks(plan), depth=1)
            yield from by_step(read)
        finally:
            rows.close()


class BlockReader:
    """Reads planned blocks; the column ``replaced`` says which rows stand in for damaged ones."""

    def __init__(self, store: EmbeddingStore, order: StreamOrder, reader: RowReader) -> None:
        self._store = store
        self._reader = reader
        self._order = order

    def read(self, block: Block) -> pa.Table:
        """A block's rows as they lie on disk, step by step.

        Raises:
            StoreError: a damaged row group stops the stream; names it.
        """
        chosen = [self._readable(step) for step in block.steps]
        rows = np.concatenate([rows for rows, _ in chosen])
        table = self._reader.rows(rows, block.following)
        return with_replaced(table, [name for _, names in chosen for name in names])

    def _readable(self, step: PlannedStep) -> tuple[NDArray[np.int64], list[str | None]]:
        """A step's rows, and in place of which damaged row group each of them came."""
        rows = step.rows.copy()
        names: list[str | None] = [None] * len(rows)
        if self._store.damaged_rows == "replace":
            groups = self._reader.groups.of(rows)
            damaged = [group for group in np.unique(groups) if not self._reader.is_readable(group)]
            for number in np.flatnonzero(np.isin(groups, damaged)):
                rows[number] = self._stand_in(step.bucket, int(step.places[number]))
                names[number] = self._reader.group_name(groups[number])
        return rows, names

    def _stand_in(self, bucket: int, place: int) -> int:
        """The first readable row at the same place of the bucket's later batches."""
        size = self._order.batch_size
        while not self._reader.damaged.issuperset(self._order.groups(bucket)):
            place += size
            row = self._order.rows(bucket, place, 1)
            if self._reader.is_readable(int(self._reader.groups.of(row)[0])):
                return int(row[0])
        raise StoreError(
            f"every row group of a picture size (bucket {bucket}) in embedding store "
            f"{self._store.uri} is damaged, nothing can stand in for its rows; delete the "
            "damaged files and run `piflow embed` again: only what is missing is made anew"
        )


def with_replaced(table: pa.Table, names: list[str | None]) -> pa.Table:
    """Rows with the column ``replaced``: the row group in whose place each came, or None."""
    return table.append_column(REPLACED, pa.array(names, pa.string()))
