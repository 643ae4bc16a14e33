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

import bisect
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from piflow.data.execution import ahead, quiet_context, remote_cause
from piflow.data.store import (
    SCHEMA,
    DamagedRows,
    EmbeddingStore,
    RowReader,
    StoreError,
    StoreManifest,
    decode_rows,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from piflow.data.online import EncodedRows

_WINDOW_GROUPS = 8  # row groups that are shuffled together
_BLOCK_STEPS = 16  # optimiser steps whose rows are read together, at most
_BLOCK_BYTES = 16 * 2**20  # that their rows take, if they are more than one step
_DATASET_BLOCKS = 64  # blocks of one Ray dataset
_START_NEXT = 16  # blocks before its end at which the next dataset is started
_OBJECT_STORE_BYTES = 512 * 2**20  # what one rank's dataset may hold in Ray's object store
_REPLACED = "replaced"  # column: the damaged row group in whose place a row came, or null
_BATCH_ORDER = 0  # counter word of the generator that orders batches; bucket b has b + 1


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: tokens ``(m, L, D)`` float32, zeros beyond ``num_tokens`` ``(m,)``.

    ``index`` counts within the step, over all ranks; pooled is ``(m, P)``, or None for encoders
    without one; sizes are pixels. Latents of the pictures are ``(m, C, h, w)`` float32, or None if
    the stream wasn't asked for them.
    """

    index: int
    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor | None
    height: int
    width: int
    latents: Tensor | None = None


@dataclass(frozen=True)
class StreamBatch:
    """One rank's part of an optimiser step; `replaced` counts rows by damaged row group."""

    step: int
    micro_batches: list[MicroBatch]
    replaced: dict[str, int]


# ------------------------------------------------------------------------------------------ order


def epoch_rows(manifest: StoreManifest, seed: int, epoch: int, bucket: int) -> NDArray[np.int64]:
    """All row numbers of a bucket in the order of an epoch, ``(n_b,)``."""
    generator = _philox(seed, epoch, bucket + 1)
    groups = _bucket_groups(manifest, bucket)
    order = _permutation(generator, len(groups))
    windows = []
    for start in range(0, len(groups), _WINDOW_GROUPS):
        rows = np.concatenate(
            [np.arange(*groups[g]) for g in order[start : start + _WINDOW_GROUPS]]
        )
        windows.append(rows[_permutation(generator, len(rows))])
    return np.concatenate(windows)


class StreamOrder:
    """Rows of any optimiser step, found without replaying the steps before it.

    Args:
        manifest: the store's manifest.
        seed: the stream's seed, 0 ≤ seed < 2^64.
        batch_size: prompts an optimiser step, over all ranks.
    """

    def __init__(self, manifest: StoreManifest, seed: int, batch_size: int) -> None:
        self._manifest = manifest
        self.seed = seed
        self.batch_size = batch_size
        self._sizes = [bucket.rows for bucket in manifest.buckets]
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
        groups = (group for shard in self._manifest.shards for group in shard.row_groups)
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
        return epoch_rows(self._manifest, self.seed, epoch, bucket)


def _bucket_groups(manifest: StoreManifest, bucket: int) -> list[tuple[int, int]]:
    """(first row, end) of each of a bucket's row groups."""
    groups, start = [], 0
    for shard in manifest.shards:
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


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PlannedStep:
    """One rank's part of a step: its micro-batches' rows, one after the other.

    `places` are the rows' places in the bucket's sequence.
    """

    step: int
    bucket: int
    places: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _Block:
    """Steps whose rows are read together; `following` are the rows that come next."""

    steps: tuple[PlannedStep, ...]
    following: NDArray[np.int64] | None


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
            rows, picks = self._encoded, _BlockReader(self.store, self._order, self._encoded)

            def read(plan: PlannedStep) -> StreamBatch:
                rows.advance()
                return self._to_batch(plan, picks.read(_Block((plan,), None)))

            return ahead(read, islice(self._plan(), len(rows.steps)))
        return ahead(lambda pair: self._to_batch(*pair), self.tables())

    def tables(self) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """This rank's rows of every step of a store, as they lie on disk."""
        for block, table in self._local_tables() if self._reader == "local" else self._ray_tables():
            start = 0
            for plan in block.steps:
                yield plan, table.slice(start, len(plan.rows))
                start += len(plan.rows)

    def _local_tables(self) -> Iterator[tuple[_Block, pa.Table]]:
        rows = RowReader(self.store, self._columns)
        reader = _BlockReader(self.store, self._order, rows)
        try:
            yield from ahead(lambda block: (block, reader.read(block)), self._blocks(), depth=1)
        finally:
            rows.close()

    def _blocks(self) -> Iterator[_Block]:
        """The plan in blocks; a window of row groups is read ahead of the one in use."""
        manifest, size = self.store.manifest, self._batch_size
        window = max(1, _WINDOW_GROUPS * manifest.inputs.rows_per_group // size)  # in steps
        row_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.num_rows
        most = int(_BLOCK_BYTES / (row_bytes * len(self._mine)))
        steps = max(1, min(_BLOCK_STEPS, window // 2, most))
        plan, upcoming = self._plan(), deque[PlannedStep]()
        while True:
            upcoming.extend(islice(plan, steps + window - len(upcoming)))
            block = tuple(upcoming.popleft() for _ in range(steps))
            yield _Block(block, np.concatenate([step.rows for step in upcoming]))

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
        replaced = Counter(name for name in table[_REPLACED].to_pylist() if name is not None)
        return StreamBatch(plan.step, micro_batches, dict(replaced))

    def _ray_tables(self) -> Iterator[tuple[_Block, pa.Table]]:
        """Datasets follow one another without a gap."""
        plan = self._blocks()
        pool = ThreadPoolExecutor(1, thread_name_prefix="next-dataset")
        try:
            blocks = list(islice(plan, _DATASET_BLOCKS))
            tables = _start_dataset(self.store, self._order, blocks, self._columns)
            while True:
                upcoming = list(islice(plan, _DATASET_BLOCKS))
                following: Future[Iterator[pa.Table]] | None = None
                for number, block in enumerate(blocks):
                    if following is None and number >= len(blocks) - _START_NEXT:
                        following = pool.submit(
                            _start_dataset, self.store, self._order, upcoming, self._columns
                        )
                    yield block, _require_block(next(tables, None), block)
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


class _BlockReader:
    """Reads planned blocks; the column ``replaced`` says which rows stand in for damaged ones."""

    def __init__(self, store: EmbeddingStore, order: StreamOrder, reader: RowReader) -> None:
        self._store = store
        self._reader = reader
        self._order = order

    def read(self, block: _Block) -> pa.Table:
        """A block's rows as they lie on disk, step by step.

        Raises:
            StoreError: a damaged row group stops the stream; names it.
        """
        chosen = [self._readable(plan) for plan in block.steps]
        rows = np.concatenate([rows for rows, _ in chosen])
        table = self._reader.rows(rows, block.following)
        names = [name for _, names in chosen for name in names]
        return table.append_column(_REPLACED, pa.array(names, pa.string()))

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


class ReadRows:
    """Ray Data's reading actor: a block's plan in, its rows as they lie on disk out."""

    def __init__(
        self,
        store_uri: str,
        manifest_json: str,
        damaged_rows: DamagedRows,
        seed: int,
        batch_size: int,
        columns: list[str] | None,
    ) -> None:
        manifest = StoreManifest.model_validate_json(manifest_json)
        store = EmbeddingStore(store_uri, manifest, damaged_rows)
        order = StreamOrder(manifest, seed, batch_size)
        self._reader = _BlockReader(store, order, RowReader(store, columns))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        """Read one item, see `_item`."""
        names = ("step", "bucket", "places", "rows", "following")
        *plans, following = (np.asarray(batch[name][0], dtype=np.int64) for name in names)
        steps = (
            PlannedStep(int(step), int(bucket), places, rows)
            for step, bucket, places, rows in zip(*plans, strict=True)
        )
        block = _Block(tuple(steps), following)
        return self._reader.read(block).append_column("step", pa.array(_step_numbers(block)))


def _step_numbers(block: _Block) -> NDArray[np.int64]:
    """Each row's step."""
    return np.repeat([plan.step for plan in block.steps], [len(plan.rows) for plan in block.steps])


def _item(block: _Block) -> dict[str, Any]:
    """A block as Ray Data takes it: the steps' fields stacked."""
    fields = [vars(plan) for plan in block.steps]
    stacked = {name: np.stack([field[name] for field in fields]) for name in fields[0]}
    return stacked | {"following": block.following}


def _start_dataset(
    store: EmbeddingStore,
    order: StreamOrder,
    blocks: list[_Block],
    columns: list[str] | None,
) -> Iterator[pa.Table]:
    """Start reading; returns when the first block's rows are there."""
    import ray

    items = [_item(block) for block in blocks]
    source = ray.data.from_items(items, override_num_blocks=len(items))
    context = quiet_context(source)
    context.target_max_block_size = None  # one block an item, however large
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=_OBJECT_STORE_BYTES)
    dataset = source.map_batches(
        ReadRows,
        fn_constructor_args=(
            store.uri,
            store.manifest.to_json(),
            store.damaged_rows,
            order.seed,
            order.batch_size,
            columns,
        ),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,  # the ranks' own CPUs are all taken; reading mostly waits for storage
    )
    tables = _tables(dataset)
    first = next(tables)
    return chain([first], tables)


def _tables(dataset: Any) -> Iterator[pa.Table]:
    import ray

    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    except ray.exceptions.RayError as error:
        raise remote_cause(error) from error


def _require_block(table: pa.Table | None, block: _Block) -> pa.Table:
    """The rows that Ray gave, after a check that they are the block's, in full."""
    found = np.array([]) if table is None else table["step"].to_numpy()
    expected = _step_numbers(block)
    if table is None or not np.array_equal(found, expected):
        raise RuntimeError(
            f"the training stream lost its order: expected {len(expected)} rows of steps "
            f"{sorted(set(expected.tolist()))}, got {len(found)} of {sorted(set(found.tolist()))}"
        )
    return table.drop_columns(["step"])
