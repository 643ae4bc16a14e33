"""The training stream: which prompts every optimiser step sees, and how they are read.

**Order.** It is a pure function of (manifest, seed, batch size); the number of workers and the way
of reading don't enter. In epoch ``e`` each bucket (picture size) ``b`` with ``n_b`` prompts is put
in a random order: its row groups are permuted, then the rows are shuffled within windows of 8 row
groups, so that a reader works on few row groups at a time. The random numbers are raw outputs of
``Philox(key=[seed, e])``. The orders of all epochs, one after the other, make the bucket's endless
sequence, and its consecutive slices of ``batch_size`` prompts are the bucket's batches. So

* an optimiser step has one picture size;
* in a bucket's sequence, every prompt comes exactly once an epoch;
* what an epoch leaves over, fewer than ``batch_size`` prompts a bucket, opens the bucket's first
  batch that the next epoch completes: a batch may span epochs, and nothing is dropped or repeated;
* with one bucket, the stream is the plain concatenation of its epochs.

A batch belongs to the epoch of its last prompt. Epoch ``e`` has ``⌊n_b(e+1)/B⌋ - ⌊n_b·e/B⌋``
batches of bucket ``b``, and they are taken in a random order drawn from the same generator. These
counts are closed formulas: any step is found without replaying what came before it.

**Ranks.** A batch is cut into micro-batches, and rank ``r`` of ``W`` takes those whose index is
``r`` modulo ``W``: at least one, and where ``W`` doesn't divide their number some ranks one more.

**Damage.** A row group that is gone or unreadable stops the stream, or (``damaged_rows="replace"``)
each of its rows is replaced by the row at the same place of the bucket's next batch, or of the one
after it, and so on until one can be read. That depends on nothing but the order and the damage, and
no other row moves: all ranks agree without talking, and so does a run that is resumed.

**Reading.**

::

    rank's process: plan (steps, row numbers) --> Ray Data: one actor reads row groups, cuts rows
                    tensors <-- decode thread <-- an Arrow block of up to 16 steps, in order, as on
                                                  disk

Every rank has its own dataset over the next 64 blocks; the following one is started before it is
used up. Without Ray (``reader="local"``) the same plan is read in the process. Either way, one
window of row groups is being read while the rows of another are cut.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from piflow.data.background import ahead
from piflow.data.batch import MicroBatch, StreamBatch
from piflow.data.blocks import REPLACED, Block, BlockReader
from piflow.data.manifest import DamagedRows
from piflow.data.order import WINDOW_GROUPS, PlannedStep, StreamOrder
from piflow.data.ray_reader import require_block, start_dataset
from piflow.data.reader import EmbeddingStore, RowReader
from piflow.data.rows import SCHEMA, decode_rows

if TYPE_CHECKING:
    from piflow.data.online import EncodedRows


_BLOCK_STEPS = 16  # optimiser steps whose rows are read together, at most

_BLOCK_BYTES = 16 * 2**20  # that their rows take, if they are more than one step

_DATASET_BLOCKS = 64  # blocks of one Ray dataset

_START_NEXT = 16  # blocks before its end at which the next dataset is started


class TrainStream:
    """One rank's share of the endless training stream.

    Args:
        store: an embedding store, or its URI.
        seed: the order's seed.
        batch_size: prompts an optimiser step, over all ranks.
        micro_batch_size: prompts a forward pass.
        rank: this rank, from 0.
        world_size: number of ranks.
        start_sample: prompts consumed before, over all ranks; a multiple of ``batch_size``.
        damaged_rows: what is done about rows in damaged row groups, of a store given by its URI.
        reader: ``ray`` reads through Ray Data (Ray must be running), ``local`` in this process.
        encoded: in online mode, this rank's row groups, for the steps from ``start_sample`` on.
        with_latents: read the pictures' latents too.

    Raises:
        ValueError: the numbers don't fit one another, or the store can't be used.
    """

    def __init__(
        self,
        store: str | EmbeddingStore,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_sample: int = 0,
        damaged_rows: DamagedRows = "stop",
        reader: Literal["ray", "local"] = "ray",
        encoded: EncodedRows | None = None,
        with_latents: bool = False,
    ) -> None:
        _check_sizes(batch_size, micro_batch_size, rank, world_size)
        if start_sample < 0 or start_sample % batch_size:
            raise ValueError(
                f"start_sample must be a multiple of batch_size ({batch_size}), got {start_sample}"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        self.store = EmbeddingStore.open(store, damaged_rows) if isinstance(store, str) else store
        if with_latents:
            self.store.require_latents()
        self._columns = None if with_latents else SCHEMA.names
        self._order = StreamOrder(self.store.manifest, seed, batch_size)
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        numbers = np.arange(batch_size).reshape(-1, micro_batch_size)
        self._mine = numbers[rank::world_size].reshape(-1)  # this rank's part of a batch
        self._rank = rank
        self._world_size = world_size
        self._start_step = start_sample // batch_size
        self._reader = reader
        self._encoded = encoded

    def epoch_of(self, step: int) -> float:
        """Passes over the store before `step`: prompts consumed by then over prompts in it."""
        return step * self._batch_size / self.store.manifest.num_rows

    def batches(self) -> Iterator[StreamBatch]:
        """This rank's part of every optimiser step from ``start_sample`` on.

        Without end, or until the last of the steps that `encoded` is for.
        """
        if self._encoded is not None:
            rows, picks = self._encoded, BlockReader(self.store, self._order, self._encoded)

            def read(plan: PlannedStep) -> StreamBatch:
                rows.advance()
                return self._to_batch(plan, picks.read(Block((plan,), None)))

            return ahead(read, islice(self._plan(), len(rows.steps)))
        return ahead(lambda pair: self._to_batch(*pair), self.tables())

    def tables(self) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """This rank's rows of every step of a store, as they lie on disk."""
        for block, table in self._local_tables() if self._reader == "local" else self._ray_tables():
            start = 0
            for plan in block.steps:
                yield plan, table.slice(start, len(plan.rows))
                start += len(plan.rows)

    def _local_tables(self) -> Iterator[tuple[Block, pa.Table]]:
        rows = RowReader(self.store, self._columns)
        reader = BlockReader(self.store, self._order, rows)
        try:
            yield from ahead(lambda block: (block, reader.read(block)), self._blocks(), depth=1)
        finally:
            rows.close()

    def _blocks(self) -> Iterator[Block]:
        """The plan in blocks; a window of row groups is read ahead of the one in use."""
        manifest, size = self.store.manifest, self._batch_size
        window = max(1, WINDOW_GROUPS * manifest.inputs.rows_per_group // size)  # in steps
        row_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.num_rows
        most = int(_BLOCK_BYTES / (row_bytes * len(self._mine)))
        steps = max(1, min(_BLOCK_STEPS, window // 2, most))
        plan, upcoming = self._plan(), deque[PlannedStep]()
        while True:
            upcoming.extend(islice(plan, steps + window - len(upcoming)))
            block = tuple(upcoming.popleft() for _ in range(steps))
            yield Block(block, np.concatenate([step.rows for step in upcoming]))

    def _plan(self) -> Iterator[PlannedStep]:
        for step in count(self._start_step):
            bucket, start = self._order.place(step)
            rows = self._order.rows(bucket, start, self._batch_size)
            yield PlannedStep(step, bucket, start + self._mine, rows[self._mine])

    def _to_batch(self, plan: PlannedStep, table: pa.Table) -> StreamBatch:
        import torch

        batch = decode_rows(table, self.store.manifest.inputs)
        bucket = self.store.manifest.buckets[plan.bucket]
        size = self._micro_batch_size
        micro_batches = []
        for number, start in enumerate(range(0, len(plan.rows), size)):
            part = slice(start, start + size)
            micro_batches.append(
                MicroBatch(
                    index=self._rank + number * self._world_size,
                    prompt_ids=batch.prompt_ids[part],
                    prompts=batch.prompts[part],
                    tokens=batch.tokens[part],
                    num_tokens=batch.num_tokens[part],
                    pooled=None if batch.pooled is None else batch.pooled[part],
                    height=bucket.height,
                    width=bucket.width,
                    latents=None if batch.latents is None else torch.stack(batch.latents[part]),
                )
            )
        replaced = Counter(name for name in table[REPLACED].to_pylist() if name is not None)
        return StreamBatch(plan.step, micro_batches, dict(replaced))

    def _ray_tables(self) -> Iterator[tuple[Block, pa.Table]]:
        """Datasets follow one another without a gap."""
        plan = self._blocks()
        pool = ThreadPoolExecutor(1, thread_name_prefix="next-dataset")
        try:
            blocks = list(islice(plan, _DATASET_BLOCKS))
            tables = start_dataset(self.store, self._order, blocks, self._columns)
            while True:
                upcoming = list(islice(plan, _DATASET_BLOCKS))
                following: Future[Iterator[pa.Table]] | None = None
                for number, block in enumerate(blocks):
                    if following is None and number >= len(blocks) - _START_NEXT:
                        following = pool.submit(
                            start_dataset, self.store, self._order, upcoming, self._columns
                        )
                    yield block, require_block(next(tables, None), block)
                if following is None:
                    raise RuntimeError("a dataset of the training stream held no step")
                blocks, tables = upcoming, following.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check_sizes(batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
    if batch_size <= 0 or micro_batch_size <= 0 or batch_size % micro_batch_size:
        raise ValueError(
            f"batch_size ({batch_size}) must be a positive multiple of micro_batch_size "
            f"({micro_batch_size})"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
    micro_batches = batch_size // micro_batch_size
    if micro_batches < world_size:
        raise ValueError(
            f"{micro_batches} micro-batches a step (batch_size {batch_size} / micro_batch_size "
            f"{micro_batch_size}) are too few for {world_size} ranks; use at most {micro_batches}"
        )
