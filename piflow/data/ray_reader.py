"""Reads the training stream's rows through Ray Data."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from piflow.data.background import quiet_context, remote_cause
from piflow.data.blocks import Block, BlockReader, StreamPlan, blocks, by_step, columns, stored
from piflow.data.manifest import DamagedRows, StoreManifest
from piflow.data.order import PlannedStep, StreamOrder
from piflow.data.reader import EmbeddingStore, RowReader
from piflow.data.rows import decoded

if TYPE_CHECKING:
    from numpy.typing import NDArray


_OBJECT_STORE_BYTES = 512 * 2**20  # what one rank's dataset may hold in Ray's object store

_DATASET_BLOCKS = 64  # blocks of one Ray dataset

_START_NEXT = 16  # blocks before its end at which the next dataset is started


class RayReader:
    """Reads a store through Ray Data: an actor reads and decodes, the rank takes what is ready.

    Every rank has its own dataset over the next 64 blocks; the following one is started before it
    is used up.
    """

    def read(self, plan: StreamPlan) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """Each step with its rows, from the blocks that the actor has decoded."""
        return by_step(_blocks_read(plan))


def _blocks_read(plan: StreamPlan) -> Iterator[tuple[Block, pa.Table]]:
    """Datasets follow one another without a gap."""
    planned = blocks(plan)
    pool = ThreadPoolExecutor(1, thread_name_prefix="next-dataset")
    try:
        now = list(islice(planned, _DATASET_BLOCKS))
        tables = _start_dataset(plan, now)
        while True:
            upcoming = list(islice(planned, _DATASET_BLOCKS))
            following: Future[Iterator[pa.Table]] | None = None
            for number, block in enumerate(now):
                if following is None and number >= len(now) - _START_NEXT:
                    following = pool.submit(_start_dataset, plan, upcoming)
                yield block, _require_block(next(tables, None), block)
            if following is None:
                raise RuntimeError("a dataset of the training stream held no step")
            now, tables = upcoming, following.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class ReadRows:
    """Ray Data's reading actor: a block's plan in, its decoded rows out."""

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
        self._inputs = manifest.inputs
        self._reader = BlockReader(store, order, RowReader(store, columns))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        """Read one item, see `_item`."""
        names = ("step", "bucket", "places", "rows", "following")
        *plans, following = (np.asarray(batch[name][0], dtype=np.int64) for name in names)
        steps = (
            PlannedStep(int(step), int(bucket), places, rows)
            for step, bucket, places, rows in zip(*plans, strict=True)
        )
        block = Block(tuple(steps), following)
        table = decoded(self._reader.read(block), self._inputs)
        return table.append_column("step", pa.array(_step_numbers(block)))


def _step_numbers(block: Block) -> NDArray[np.int64]:
    """Each row's step."""
    return np.repeat([plan.step for plan in block.steps], [len(plan.rows) for plan in block.steps])


def _item(block: Block) -> dict[str, Any]:
    """A block as Ray Data takes it: the steps' fields stacked."""
    fields = [vars(plan) for plan in block.steps]
    stacked = {name: np.stack([field[name] for field in fields]) for name in fields[0]}
    return stacked | {"following": block.following}


def _start_dataset(plan: StreamPlan, planned: list[Block]) -> Iterator[pa.Table]:
    """Start reading; returns when the first block's rows are there."""
    import ray

    store, order = stored(plan), plan.order
    items = [_item(block) for block in planned]
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
            columns(plan),
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


def _require_block(table: pa.Table | None, block: Block) -> pa.Table:
    """The rows that Ray gave, after a check that they are the block's, in full."""
    found = np.array([]) if table is None else table["step"].to_numpy()
    expected = _step_numbers(block)
    if table is None or not np.array_equal(found, expected):
        raise RuntimeError(
            f"the training stream lost its order: expected {len(expected)} rows of steps "
            f"{sorted(set(expected.tolist()))}, got {len(found)} of {sorted(set(found.tolist()))}"
        )
    return table.drop_columns(["step"])
