"""The training stream: which prompts every optimiser step sees, and how they are read.

**Order.** It is a pure function of (manifest, seed, batch size); the number of workers and the way
of reading don't enter. In epoch ``e`` each bucket (picture size) ``b`` with ``n_b`` prompts is put
in a random order: its row groups are permuted, then the rows are shuffled within windows of 8 row
groups, so that a reader works on few row groups at a time. The random numbers are raw outputs of
``Philox(key=[seed, e])``. The orders of all epochs, one after the other, make the bucket's endless
sequence, and its consecutive slices of ``batch_size`` prompts are the bucket's batches. So

* an optimiser step has one picture size, and one size of the pictures to be edited;
* in a bucket's sequence, every prompt comes exactly once an epoch;
* what an epoch leaves over, fewer than ``batch_size`` prompts a bucket, opens the bucket's first
  batch that the next epoch completes: a batch may span epochs, and nothing is dropped or repeated;
* with one bucket, the stream is the plain concatenation of its epochs.

A batch belongs to the epoch of its last prompt. Epoch ``e`` has ``⌊n_b(e+1)/B⌋ - ⌊n_b·e/B⌋``
batches of bucket ``b``, and they are taken in a random order drawn from the same generator. These
counts are closed formulas: any step is found without replaying what came before it.

**Ranks.** A batch is cut into micro-batches, and rank ``r`` of ``W`` takes those whose index is
``r`` modulo ``W``: at least one, and where ``W`` doesn't divide their number some ranks one more.

**Lengths.** For a model that masks the text's padding, a batch is ordered by the lengths of its
prompts before it is cut (``by_length``): micro-batches are then of like length, padded little, and
take about as long on all ranks. A length is the text's in bytes, which is known whether or not it
is encoded. The order within a batch is all that changes, and it is a pure function of the store and
the batch. A micro-batch's random numbers belong to its index, and its prompts take them in that
order, whichever rank it falls to.

**Damage.** A row group that is gone or unreadable stops the stream, or (``damaged_rows="replace"``)
each of its rows is replaced by the row at the same place of the bucket's next batch, or of the one
after it, and so on until one can be read. That depends on nothing but the order and the damage, and
no other row moves: all ranks agree without talking, and so does a run that is resumed.

**Reading.** The rows come from a `Reader`, already decoded; here they become tensors and
micro-batches::

    rank's process: plan (steps, row numbers) --> Ray Data: one actor reads row groups, cuts rows,
                    tensors in its memory     <-- decodes; Arrow blocks of up to 16 steps, in order

That is the `RayReader`. The `LocalReader` does the same in threads of the rank's process, and the
`EncodedReader` gets rows from encoder actors instead of files. All of them give the same batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from piflow.data.batch import MicroBatch, StreamBatch
from piflow.data.blocks import REPLACED, Reader, StreamPlan
from piflow.data.manifest import DamagedRows
from piflow.data.order import PlannedStep, StreamOrder
from piflow.data.ray_reader import RayReader
from piflow.data.reader import EmbeddingStore, PromptStore
from piflow.data.rows import as_tensors


class TrainStream:
    """One rank's share of the endless training stream.

    Args:
        store: an embedding store, or its URI; or, for an `EncodedReader`, a planned one.
        seed: the order's seed.
        batch_size: prompts an optimiser step, over all ranks.
        micro_batch_size: prompts a forward pass.
        rank: this rank, from 0.
        world_size: number of ranks.
        start_sample: prompts consumed before, over all ranks; a multiple of ``batch_size``.
        damaged_rows: what is done about rows in damaged row groups, of a store given by its URI.
        reader: how rows are read; default: through Ray Data (Ray must be running).
        with_latents: read the pictures' latents too.
        by_length: order each batch by the prompts' lengths.

    Raises:
        ValueError: the numbers don't fit one another, or the store can't be used.
    """

    def __init__(
        self,
        store: str | PromptStore,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_sample: int = 0,
        damaged_rows: DamagedRows = "stop",
        reader: Reader | None = None,
        with_latents: bool = False,
        by_length: bool = False,
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
        numbers = np.arange(batch_size).reshape(-1, micro_batch_size)
        self.plan = StreamPlan(
            self.store,
            StreamOrder(self.store.layout, seed, batch_size),
            mine=numbers[rank::world_size].reshape(-1),
            first_step=start_sample // batch_size,
            with_latents=with_latents,
            lengths=self.store.lengths() if by_length else None,
        )
        self._reader = reader or RayReader()
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size

    def epoch_of(self, step: int) -> float:
        """Passes over the store before `step`: prompts consumed by then over prompts in it."""
        return step * self._batch_size / self.store.layout.num_rows

    def batches(self) -> Iterator[StreamBatch]:
        """This rank's part of every optimiser step from ``start_sample`` on.

        Without end, or until the last of the steps that the reader is for. Nobody may write to the
        tensors: their memory may be Ray's.
        """
        for step, table in self._reader.read(self.plan):
            yield self._to_batch(step, table)

    def _to_batch(self, step: PlannedStep, table: pa.Table) -> StreamBatch:
        import torch

        batch = as_tensors(table, self.store.layout.inputs)
        bucket = self.store.layout.buckets[step.bucket]
        size = self._micro_batch_size
        micro_batches = []
        for number, start in enumerate(range(0, len(step.rows), size)):
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
                    condition=(
                        None if batch.conditions is None else torch.stack(batch.conditions[part])
                    ),
                    negative=None if batch.negative is None else batch.negative.select(part),
                )
            )
        replaced = Counter(name for name in table[REPLACED].to_pylist() if name is not None)
        return StreamBatch(step.step, micro_batches, dict(replaced))


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
