from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from piflow.backbones.text import EncodedPrompt
from piflow.data import reader as store_module
from piflow.data.batch import MicroBatch, StreamBatch
from piflow.data.blocks import LocalReader, StreamPlan, blocks
from piflow.data.manifest import DamagedRows, ShardEntry, StoreError
from piflow.data.order import StreamOrder, epoch_rows
from piflow.data.parquet import ParquetFile
from piflow.data.prompts import Prompt
from piflow.data.reader import EmbeddingStore, RowReader
from piflow.data.stream import TrainStream
from piflow.storage.fingerprint import EncoderIdentity

MakeStore = Callable[..., EmbeddingStore]
ONE_SIZE = {(32, 32): 103}
THREE_SIZES = {(32, 32): 50, (64, 32): 33, (16, 16): 3}


def _steps(
    store: EmbeddingStore, count: int, rank: int = 0, world_size: int = 1, start: int = 0
) -> list[list[MicroBatch]]:
    return [batch.micro_batches for batch in _batches(store, count, rank, world_size, start)]


def _batches(
    store: EmbeddingStore,
    count: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    damaged_rows: DamagedRows = "stop",
    *,
    by_length: bool = False,
) -> list[StreamBatch]:
    stream = TrainStream(
        store.uri,
        seed=5,
        batch_size=12,
        micro_batch_size=2,
        rank=rank,
        world_size=world_size,
        start_sample=start * 12,
        damaged_rows=damaged_rows,
        reader=LocalReader(),
        by_length=by_length,
    )
    batches = list(islice(stream.batches(), count))
    assert [batch.step for batch in batches] == list(range(start, start + count))
    return batches


def _same(ours: MicroBatch, theirs: MicroBatch) -> bool:
    return (
        (ours.index, ours.prompt_ids, ours.prompts, ours.height, ours.width)
        == (theirs.index, theirs.prompt_ids, theirs.prompts, theirs.height, theirs.width)
        and torch.equal(ours.tokens, theirs.tokens)
        and torch.equal(ours.num_tokens, theirs.num_tokens)
        and torch.equal(ours.pooled, theirs.pooled)
    )


# ------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("sizes", [ONE_SIZE, THREE_SIZES])
@pytest.mark.parametrize("batch_size", [1, 7, 12, 64, 200])
def test_every_prompt_comes_once_an_epoch(
    make_store: MakeStore, sizes: dict[tuple[int, int], int], batch_size: int
) -> None:
    """Each bucket's batches, put end to end, are its epochs, put end to end."""
    manifest = make_store(sizes).manifest
    order = StreamOrder(manifest, 5, batch_size)
    epochs = 6
    steps = sum(rows * epochs // batch_size for rows in sizes.values())
    sequence: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    for step in range(steps):
        bucket, rows = order.step(step)
        assert rows.shape == (batch_size,)
        sequence[bucket] += rows.tolist()
    start = 0
    for bucket, count in enumerate(sizes.values()):
        mine = sequence[bucket]
        assert count * epochs - len(mine) in range(batch_size)  # the rest opens the next batch
        for first in range(0, len(mine) - count + 1, count):
            assert sorted(mine[first : first + count]) == list(range(start, start + count))
        start += count


def test_with_one_bucket_batches_are_slices_of_the_epochs(make_store: MakeStore) -> None:
    manifest = make_store(ONE_SIZE).manifest
    epochs = np.concatenate([epoch_rows(manifest, 5, epoch, 0) for epoch in range(3)])
    order = StreamOrder(manifest, 5, 12)
    for step in range(len(epochs) // 12):
        assert order.step(step)[1].tolist() == epochs[step * 12 : step * 12 + 12].tolist()


def test_any_step_is_found_without_the_ones_before(make_store: MakeStore) -> None:
    manifest = make_store(THREE_SIZES).manifest
    replayed = StreamOrder(manifest, 5, 12)
    steps = [replayed.step(step) for step in range(40)]
    for step in (0, 39, 6, 7, 8, 31, 2):
        bucket, rows = StreamOrder(manifest, 5, 12).step(step)
        assert bucket == steps[step][0] and rows.tolist() == steps[step][1].tolist()


def test_order_differs_by_epoch_and_seed_and_only_by_them(make_store: MakeStore) -> None:
    manifest = make_store(ONE_SIZE).manifest
    orders = [epoch_rows(manifest, seed, epoch, 0).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(103)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_rows(manifest, 1, 1, 0).tolist() == orders[3]


def test_the_order_is_the_same_on_every_machine_and_version(make_store: MakeStore) -> None:
    """A resumed run must meet the order that it left: these numbers may never change."""
    manifest = make_store({(8, 8): 10}, rows_per_group=3).manifest
    assert epoch_rows(manifest, 7, 2, 0).tolist() == [1, 2, 0, 7, 6, 8, 5, 3, 9, 4]


def test_rows_are_mixed_within_a_window_of_row_groups_only(make_store: MakeStore) -> None:
    manifest = make_store({(8, 8): 200}, rows_per_shard=100, rows_per_group=5).manifest
    rows = epoch_rows(manifest, 0, 0, 0)
    for window in rows.reshape(5, 40):  # 8 row groups of 5 rows
        assert len(set(window // 5)) == 8
        assert len(set(window[:5] // 5)) > 1


def test_the_buckets_are_mixed(make_store: MakeStore) -> None:
    order = StreamOrder(make_store({(8, 8): 100, (16, 8): 100}).manifest, 0, 4)
    buckets = [order.step(step)[0] for step in range(50)]
    assert Counter(buckets) == {0: 25, 1: 25}
    assert len(set(buckets[:10])) == 2


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_rank_sees(make_store: MakeStore, world_size: int) -> None:
    store = make_store(THREE_SIZES)
    alone = _steps(store, 20)
    ranks = [_steps(store, 20, rank, world_size) for rank in range(world_size)]
    for step, expected in enumerate(alone):
        found = sorted((m for rank in ranks for m in rank[step]), key=lambda m: m.index)
        assert [m.index for m in found] == list(range(6))
        assert all(_same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("sizes", [ONE_SIZE, THREE_SIZES])
def test_resuming_gives_the_tail_of_the_whole(
    make_store: MakeStore, sizes: dict[tuple[int, int], int]
) -> None:
    """Stopped before any step of two to three epochs, and gone on with 1 to 3 ranks."""
    store = make_store(sizes)
    whole = _steps(store, 24)
    for start in range(24):
        world_size = 1 + start % 3
        for rank in range(world_size):
            tail = _steps(store, 24 - start, rank, world_size, start)
            for ours, theirs in zip(tail, whole[start:], strict=True):
                expected = theirs[rank::world_size]
                assert all(_same(a, b) for a, b in zip(ours, expected, strict=True))


def _groups_read(
    store: EmbeddingStore, start: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> set[tuple[str, int]]:
    """(file, row group) of everything that is read for so many steps from a step on."""
    read: set[tuple[str, int]] = set()
    original = store_module._read_row_group

    def recorded(store: EmbeddingStore, entry: ShardEntry, group: int, *rest: Any) -> Any:
        read.add((entry.path, group))
        return original(store, entry, group, *rest)

    monkeypatch.setattr(store_module, "_read_row_group", recorded)
    reader = RowReader(store)
    order = StreamOrder(store.manifest, 5, 12)
    for step in range(start, start + count):
        reader.rows(order.step(step)[1])
    return read


def test_resuming_reads_no_row_group_that_lies_wholly_before(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 row groups in windows of 8, a resumed epoch reads those with unseen rows, once each."""
    store = make_store({(8, 8): 240}, rows_per_shard=40, rows_per_group=4)  # 20 steps an epoch
    rows = epoch_rows(store.manifest, 5, 0, 0)
    for start in (0, 3, 8, 16, 19):
        read = _groups_read(store, start, 20 - start, monkeypatch)
        left = {(f"shard-{row // 40:05d}.parquet", row % 40 // 4) for row in rows[start * 12 :]}
        assert read == left
        whole_windows = start * 12 // 32  # each holds 8 row groups that are used up
        assert len(read) <= 60 - 8 * whole_windows


def test_a_row_group_size_far_above_the_prompts_reads_no_further_ahead(
    make_store: MakeStore,
) -> None:
    store = make_store({(8, 8): 10}, rows_per_group=10**9)
    plan = StreamPlan(store, StreamOrder(store.manifest, 5, 2), np.arange(2), 0)
    assert len(next(blocks(plan)).following) <= 8 * 10, "a window of the groups that are there"


def _damage(store: EmbeddingStore, name: str, damage: str) -> None:
    """A file is gone or cut short, or a byte of its first row group is another."""
    path = Path(store.uri) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-50])
    else:
        column = pq.ParquetFile(path).metadata.row_group(0).column(6)
        content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
        path.write_bytes(content)


class _CountedFile(io.FileIO):
    """A file that adds what is read of it to a list."""

    def __init__(self, path: str, sizes: list[int]) -> None:
        super().__init__(path)
        self._sizes = sizes

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(-1 if size is None else size)
        self._sizes.append(len(content))
        return content


def test_the_bytes_that_a_resumed_run_reads_are_its_row_groups(
    write_store: Callable[..., EmbeddingStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the files: the pages of the row groups with unseen rows, and each file's end."""
    states = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    store = write_store(
        str(tmp_path / "store"),
        [Prompt(f"prompt {number}", 8, 8) for number in range(240)],
        lambda prompt: EncodedPrompt(states, None, False),
        identity=EncoderIdentity(name="wide", weights_sha256="0", max_tokens=5, hidden_size=512),
        rows_per_shard=40,
    )
    sizes: list[int] = []

    def opened(uri: str, check: Any, metadata: Any = None, place: Any = None) -> ParquetFile:
        return ParquetFile(pa.PythonFile(_CountedFile(uri, sizes), mode="r"), check, metadata)

    files = [pq.ParquetFile(Path(store.uri) / entry.path) for entry in store.manifest.shards]
    monkeypatch.setattr(store_module, "open_parquet", opened)
    rows = epoch_rows(store.manifest, 5, 0, 0)
    for start in (0, 8, 16):
        sizes.clear()
        reader, order = RowReader(store), StreamOrder(store.manifest, 5, 12)
        for step in range(start, 20):
            reader.rows(order.step(step)[1])
        left = {divmod(int(row) // 4, 10) for row in rows[start * 12 :]}
        pages = sum(_pages(files[shard], [group]) for shard, group in left)
        assert pages <= sum(sizes) <= pages + len(files) * 2**16  # what pyarrow reads for the end
    assert pages < 0.3 * sum(entry.bytes for entry in store.manifest.shards)


def _pages(file: pq.ParquetFile, groups: Iterable[int]) -> int:
    """Bytes of some row groups' pages."""
    found = (file.metadata.row_group(group) for group in groups)
    return sum(g.column(c).total_compressed_size for g in found for c in range(g.num_columns))


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damage_in_mid_run_stops_the_stream_and_is_named(
    make_store: MakeStore, damage: str
) -> None:
    store = make_store(ONE_SIZE)
    stream = TrainStream(
        store.uri,
        seed=5,
        batch_size=12,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        reader=LocalReader(),
    )
    _damage(store, "shard-00010.parquet", damage)  # 3 rows, opened by a later step
    kind = "open" if damage == "missing" else "read row group 0 of"
    with pytest.raises(StoreError, match=f"cannot {kind} shard-00010.parquet.*piflow embed"):
        list(islice(stream.batches(), 9))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("sizes", [ONE_SIZE, THREE_SIZES])
def test_only_damaged_rows_are_replaced_and_all_agree(
    make_store: MakeStore, sizes: dict[tuple[int, int], int], damage: str
) -> None:
    """Each by the row at the same place of its bucket's next batch; 1 to 3 ranks, resumed or not.

    The rule is written out here from the order alone.
    """
    store = make_store(sizes)
    intact = _steps(store, 26)
    ids = store.index()["prompt_id"].to_pylist()
    lost = {ids[row] for row in range(20, 24 if damage == "flipped" else 30)}
    _damage(store, "shard-00002.parquet", damage)
    found = _batches(store, 20, damaged_rows="replace")
    rows = [[i for micro in step for i in micro.prompt_ids] for step in intact]
    sizes_of = [(step[0].height, step[0].width) for step in intact]
    for step, batch in enumerate(found):
        expected, later = list(rows[step]), step
        while lost & set(expected):
            later = sizes_of.index(sizes_of[step], later + 1)
            expected = [b if a in lost else a for a, b in zip(expected, rows[later], strict=True)]
        assert [i for micro in batch.micro_batches for i in micro.prompt_ids] == expected
        assert sum(batch.replaced.values()) == sum(i in lost for i in rows[step])
    names = {name for batch in found for name in batch.replaced}
    groups = range(1 if damage == "flipped" else 3)
    assert names == {f"row group {group} of shard-00002.parquet" for group in groups}
    for start, world_size in ((0, 2), (7, 1), (9, 3)):
        for rank in range(world_size):
            tail = _batches(store, 20 - start, rank, world_size, start, "replace")
            for ours, theirs in zip(tail, found[start:], strict=True):
                expected_micros = theirs.micro_batches[rank::world_size]
                assert all(map(_same, ours.micro_batches, expected_micros))
    with pytest.raises(StoreError, match="shard-00002.parquet"):
        _batches(store, 20)


def test_a_bucket_without_a_readable_row_stops(make_store: MakeStore) -> None:
    store = make_store({(8, 8): 10, (16, 8): 10})
    _damage(store, "shard-00001.parquet", "missing")
    with pytest.raises(StoreError, match=r"every row group of .* \(bucket 1\) .* is damaged"):
        _batches(store, 8, damaged_rows="replace")


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_pictures_are_of_prompts_that_can_be_read(make_store: MakeStore, damage: str) -> None:
    """A run with a damaged store resumes: nothing but the stream's batches needs whole files."""
    store = make_store(ONE_SIZE)
    in_order = sorted(store.index()["prompt_id"].to_pylist())
    lost = store.index()["prompt_id"].to_pylist()[: 4 if damage == "flipped" else 10]
    _damage(store, "shard-00000.parquet", damage)
    opened = EmbeddingStore.open(store.uri, "replace")
    assert opened.manifest_hash == store.manifest_hash
    expected = [prompt_id for prompt_id in in_order if prompt_id not in lost][:95]
    assert len(set(in_order[:95]) & set(lost)) > 0
    found = opened.first_by_hash(len(expected))
    assert list(found.prompt_ids) == expected
    index = opened.index()
    assert opened.read(index["row"].to_pylist()[-5:]).prompt_ids == tuple(
        index["prompt_id"].to_pylist()[-5:]
    )
    with pytest.raises(ValueError, match="104 prompts were asked"):
        opened.first_by_hash(104)


def test_a_step_has_one_picture_size_and_the_stores_rows(make_store: MakeStore) -> None:
    store = make_store(THREE_SIZES)
    for micro_batches in _steps(store, 12):
        assert len({(m.height, m.width) for m in micro_batches}) == 1
    micro = micro_batches[0]
    ids = store.index()["prompt_id"].to_pylist()
    direct = store.read([ids.index(prompt_id) for prompt_id in micro.prompt_ids])
    assert set(direct.heights) == {micro.height}
    assert direct.prompts == micro.prompts and torch.equal(direct.tokens, micro.tokens)
    assert micro.tokens.shape == (2, 5, 8) and micro.pooled.shape == (2, 6)


def test_batches_of_encoders_without_a_pooled_vector(make_store: MakeStore) -> None:
    [micro_batches] = _steps(make_store(ONE_SIZE, pooled=False), 1)
    assert len(micro_batches) == 6 and all(m.pooled is None for m in micro_batches)


@pytest.mark.parametrize(("start", "world_size"), [(0, 1), (5, 2), (11, 3)])
def test_prompts_of_like_length_share_micro_batches(
    make_store: MakeStore, start: int, world_size: int
) -> None:
    """A step's prompts stay the step's; neither workers nor a resumption change their order."""
    store = make_store(THREE_SIZES)
    plain = _batches(store, 14)
    whole = _batches(store, 14, by_length=True)
    for before, after in zip(plain, whole, strict=True):
        lengths = [len(prompt.encode()) for m in after.micro_batches for prompt in m.prompts]
        assert lengths == sorted(lengths)
        names = [[m.prompt_ids for m in batch.micro_batches] for batch in (before, after)]
        assert sorted(sum(names[0], ())) == sorted(sum(names[1], ()))
    assert any(
        [m.prompt_ids for m in before.micro_batches] != [m.prompt_ids for m in after.micro_batches]
        for before, after in zip(plain, whole, strict=True)
    )
    for rank in range(world_size):
        tail = _batches(store, 14 - start, rank, world_size, start, by_length=True)
        for ours, theirs in zip(tail, whole[start:], strict=True):
            expected = theirs.micro_batches[rank::world_size]
            assert all(_same(a, b) for a, b in zip(ours.micro_batches, expected, strict=True))


def test_damaged_rows_have_no_length(make_store: MakeStore) -> None:
    """The batch that they were in is still ordered, and its other prompts stay in it."""
    store = make_store(ONE_SIZE)
    counts = store.lengths()
    assert counts.tolist() == [len(prompt) for prompt in store.read(range(103)).prompts]
    entry = store.manifest.shards[1]
    Path(store.uri, entry.path).unlink()
    lost = slice(10, 20)  # rows of a shard
    tolerant = EmbeddingStore(store.uri, store.manifest, "replace")
    expected = counts.copy()
    expected[lost] = 0
    assert tolerant.lengths().tolist() == expected.tolist()
    with pytest.raises(StoreError):
        store.lengths()


def test_epoch_counts_passes_over_the_store(make_store: MakeStore) -> None:
    store = make_store(ONE_SIZE)
    stream = TrainStream(
        store.uri,
        seed=0,
        batch_size=12,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        reader=LocalReader(),
    )
    assert stream.epoch_of(0) == 0.0
    assert stream.epoch_of(103) == 12.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 7}, "6 micro-batches a step .* too few for 7 ranks; use at most 6"),
        ({"micro_batch_size": 5}, r"batch_size \(12\) must be a positive multiple"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\), got 2"),
        ({"start_sample": 13}, r"a multiple of batch_size \(12\), got 13"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    make_store: MakeStore, changes: dict[str, int], message: str
) -> None:
    numbers = {"seed": 0, "batch_size": 12, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    with pytest.raises(ValueError, match=message):
        TrainStream(make_store(ONE_SIZE).uri, **(numbers | changes))
