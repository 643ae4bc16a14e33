"""Steps whose rows are read together, and the reading of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from piflow.data.manifest import StoreError
from piflow.data.order import PlannedStep, StreamOrder
from piflow.data.reader import EmbeddingStore, RowReader

if TYPE_CHECKING:
    from numpy.typing import NDArray


REPLACED = "replaced"  # column: the damaged row group in whose place a row came, or null


@dataclass(frozen=True)
class Block:
    """Steps whose rows are read together; `following` are the rows that come next."""

    steps: tuple[PlannedStep, ...]
    following: NDArray[np.int64] | None


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
        chosen = [self._readable(plan) for plan in block.steps]
        rows = np.concatenate([rows for rows, _ in chosen])
        table = self._reader.rows(rows, block.following)
        names = [name for _, names in chosen for name in names]
        return table.append_column(REPLACED, pa.array(names, pa.string()))

    def _readable(self, plan: PlannedStep) -> tuple[NDArray[np.int64], list[str | None]]:
        """A step's rows, and in place of which damaged row group each of them came."""
        rows = plan.rows.copy()
        names: list[str | None] = [None] * len(rows)
        if self._store.damaged_rows == "replace":
            groups = self._reader.group_of(rows)
            damaged = [group for group in np.unique(groups) if not self._reader.is_readable(group)]
            for number in np.flatnonzero(np.isin(groups, damaged)):
                rows[number] = self._stand_in(plan.bucket, int(plan.places[number]))
                names[number] = self._reader.group_name(groups[number])
        return rows, names

    def _stand_in(self, bucket: int, place: int) -> int:
        """The first readable row at the same place of the bucket's later batches."""
        size = self._order.batch_size
        while not self._reader.damaged.issuperset(self._order.groups(bucket)):
            place += size
            row = self._order.rows(bucket, place, 1)
            if self._reader.is_readable(int(self._reader.group_of(row)[0])):
                return int(row[0])
        raise StoreError(
            f"every row group of a picture size (bucket {bucket}) in embedding store "
            f"{self._store.uri} is damaged, nothing can stand in for its rows; delete the "
            "damaged files and run `piflow embed` again: only what is missing is made anew"
        )
