"""The embedding store: Parquet shards and one manifest.

::

    store/
      manifest.json                  written last: a store without it is unfinished
      shard-00000.parquet …          rows in file order of the prompts, grouped by bucket
      empty-prompt.parquet           the embedding of "", for guidance and prompt dropout
      negative-prompt-<id>.parquet   one for each negative prompt that a recipe asked for
      writer.json                    which `piflow embed` writes here just now; gone afterwards

A row holds one prompt's valid token states only, without padding. As ``fp8`` they are e4m3 with
one float32 ``scale`` for the row, ``x = scale · q`` with ``scale = max|x| / 448``: an element is
off by at most ``max(|x| / 16, scale / 1024)``. As ``bf16`` they are rounded to 8 bits of mantissa
and ``scale`` is 1. The pooled vector stays float32, it is small; it is null for encoders that have
none. Where the prompts have pictures, a row also holds its picture's latents, as the recipe's codec
gives them, in ``bf16`` (rounded) or ``fp32`` (exact), and their shape. Where they edit pictures, it
holds the latents and the shape of the picture to be edited as well. A row group never mixes buckets
(sizes of both pictures), so that the manifest alone decides the order of training. Pages carry
checksums.

Format 2 has no latents, and is what stores without pictures are still written in; format 3 has, and
format 4 is that of stores with pictures to be edited. In format 5 the text encoder has read these
as well, and each row brings the negative prompt's states (`piflow.data.rows.NEGATIVE_COLUMNS`).

Negative prompts are additions: `piflow embed` encodes a recipe's own into a finished store, and
neither the store's inputs nor its `manifest_hash` know of them, because the recipe names the text
and the encoder decides its embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from piflow import storage
from piflow.data.layout import negative_prompt_plan
from piflow.data.manifest import (
    REMEDY,
    ConditionInputs,
    DamagedRows,
    DamageError,
    ShardEntry,
    StoreError,
    StoreManifest,
    other_encoder,
    read_manifest,
)
from piflow.data.order import RowGroups, StoreLayout
from piflow.data.parquet import ParquetFile, open_parquet
from piflow.data.rows import EmbeddingBatch, cut_rows, decode_rows
from piflow.data.shard_checks import (
    ContradictionError,
    require_footer,
    require_pages,
    require_rows,
)
from piflow.storage.fingerprint import CodecIdentity, EncoderIdentity
from piflow.storage.foreign import ForeignDataError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


_READS = 4  # row groups that are read side by side


class PromptStore(Protocol):
    """What training and evaluation ask of a store, be it written or only planned."""

    uri: str

    @property
    def layout(self) -> StoreLayout:
        """Where rows lie."""
        ...

    @property
    def manifest_hash(self) -> str:
        """Hex sha256 that names the embeddings."""
        ...

    def index(self) -> pa.Table:
        """``row``, ``prompt_id``, ``prompt``, ``height``, ``width`` of all rows."""
        ...

    def lengths(self) -> NDArray[np.int32]:
        """Bytes of all rows' prompts: how long they are, as known before they are encoded."""
        ...

    def read(self, rows: Sequence[int]) -> EmbeddingBatch:
        """Decode the rows with these numbers, in this order."""
        ...

    def first_by_hash(self, count: int) -> EmbeddingBatch:
        """The ``count`` rows with the smallest prompt ids."""
        ...

    def empty_prompt(self) -> EmbeddingBatch:
        """The embedding of "", one row."""
        ...

    def negative_prompt(self, text: str) -> EmbeddingBatch:
        """The embedding of a recipe's `guidance.negative_prompt`, one row."""
        ...

    def require_encoder(self, expected: EncoderIdentity) -> None:
        """Check that the embeddings are this encoder's; raises `StoreError`."""
        ...

    def require_latents(self, codec: CodecIdentity | None = None) -> None:
        """Check that there are pictures' latents, of this codec; raises `StoreError`."""
        ...

    def require_conditions(self, expected: ConditionInputs | None) -> None:
        """Check that there are pictures to be edited, made so, or none; raises `StoreError`."""
        ...

    def require_negative_prompt(self, text: str) -> None:
        """Check that this negative prompt is there; raises `StoreError`."""
        ...


class EmbeddingStore:
    """A complete store. Rows are numbered through all shards, in the manifest's order.

    Args:
        damaged_rows: `replace` leaves the rows of damaged row groups out of `index` and
            `first_by_hash`; `stop` raises when they come to one.
    """

    def __init__(
        self, uri: str, manifest: StoreManifest, damaged_rows: DamagedRows = "stop"
    ) -> None:
        self.uri = uri
        self.manifest = manifest
        self.damaged_rows = damaged_rows

    @staticmethod
    def open(uri: str, damaged_rows: DamagedRows = "stop") -> EmbeddingStore:
        """Open a store: reads its manifest and compares every file's presence and size.

        With `replace` the prompts' files aren't looked at: any of them may be damaged.

        Raises:
            StoreError: no or an unreadable manifest, a missing file or one of another size.
        """
        store = EmbeddingStore(uri, read_manifest(uri), damaged_rows)
        sizes = storage.file_sizes(uri)
        needed = store.manifest.files if damaged_rows == "stop" else store.manifest.singles
        for entry in needed:
            if entry.path not in sizes:
                raise StoreError(
                    f"embedding store {uri} lacks {entry.path}; run `piflow embed` again: only "
                    "what is missing is made anew"
                )
            if sizes[entry.path] != entry.bytes:
                raise StoreError(
                    f"{entry.path} of embedding store {uri} has {sizes[entry.path]} bytes, the "
                    f"manifest says {entry.bytes}; {REMEDY}"
                )
        return store

    @property
    def layout(self) -> StoreLayout:
        """Where rows lie, as the manifest says."""
        return self.manifest

    @property
    def manifest_hash(self) -> str:
        """Hex sha256 that names the store's exact content."""
        return self.manifest.manifest_hash

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            StoreError: names the first file whose content differs, and its damaged row groups.
        """
        for entry in self.manifest.files:
            found = storage.sha256(storage.join(self.uri, entry.path))
            if found != entry.sha256:
                raise StoreError(
                    f"{entry.path} of embedding store {self.uri} is corrupt ({self._damage(entry)})"
                    f": sha256 {found[:12]}…, the manifest says {shown(entry.sha256[:12])}…; "
                    f"{REMEDY}"
                )

    def _damage(self, entry: ShardEntry) -> str:
        """Which row groups of a file can't be read."""
        try:
            file = _open_shard(self, entry)
        except ContradictionError as error:
            return str(error)
        except StoreError:
            return "it can't be opened"
        damaged = []
        for group in range(file.num_row_groups):
            try:
                _read_row_group(self, entry, group, file, None)
            except StoreError:
                damaged.append(str(group))
        if damaged:
            return f"row group{'s' if len(damaged) > 1 else ''} {', '.join(damaged)}"
        return "outside the pages of its row groups, or replaced as a whole"

    def require_encoder(self, expected: EncoderIdentity) -> None:
        """Check that the store was made by the given encoder.

        Raises:
            StoreError: names both.
        """
        if self.manifest.encoder != expected:
            raise StoreError(other_encoder(self.uri, self.manifest.encoder, expected))

    def require_latents(self, codec: CodecIdentity | None = None) -> None:
        """Check that the store has pictures' latents, and of this codec if one is given.

        Raises:
            StoreError: says how to make such a store.
        """
        found = self.manifest.inputs.latents
        if found is None:
            raise StoreError(
                f"embedding store {self.uri} has no pictures' latents, which objective.pictures = "
                "store trains on; set embed.image_column and another embed.store, and run "
                "`piflow embed`"
            )
        if codec is not None and found.codec != codec:
            raise StoreError(
                f"the latents of embedding store {self.uri} were made by {found.codec}, the "
                f"recipe's model has {codec}; choose another embed.store, or set model.vae to the "
                "store's"
            )

    def require_conditions(self, expected: ConditionInputs | None) -> None:
        """Check that the store has latents of pictures to be edited, made so; None: has none.

        Raises:
            StoreError: names what differs.
        """
        found = self.manifest.inputs.conditions
        if found == expected:
            return
        there, asked = (
            "none" if how is None else f"those of {how.codec}, scaled to {how.size}, as {how.dtype}"
            for how in (found, expected)
        )
        raise StoreError(
            f"embedding store {self.uri} has pictures to be edited: {shown(there, 600)}; the "
            f"recipe asks for {asked}; choose another embed.store and run `piflow embed`"
        )

    def index(self) -> pa.Table:
        """``row``, ``prompt_id``, ``prompt``, ``height``, ``width`` of all rows.

        And ``picture``, what the prompts file calls it, where there are latents; likewise
        ``condition``, the picture to be edited.
        """
        columns = ["prompt_id", "prompt", "height", "width"]
        if self.manifest.inputs.latents is not None:
            columns.append("picture")
        if self.manifest.inputs.conditions is not None:
            columns.append("condition")
        reader = RowReader(self, columns=columns)
        tables = []
        for group in range(len(reader.groups.sizes)):
            if self.damaged_rows == "stop" or reader.is_readable(group):
                rows = reader.groups.rows(group)
                tables.append(reader.rows(rows).append_column("row", pa.array(rows)))
        return pa.concat_tables(tables)

    def lengths(self) -> NDArray[np.int32]:
        """Bytes of all rows' prompts; 0 in damaged row groups, unless these stop the stream."""
        reader = RowReader(self, columns=["prompt"])
        found = np.zeros(self.manifest.num_rows, np.int32)
        for group in range(len(reader.groups.sizes)):
            if self.damaged_rows == "stop" or reader.is_readable(group):
                rows = reader.groups.rows(group)
                found[rows] = pc.binary_length(reader.rows(rows)["prompt"]).to_numpy()
        return found

    def read(self, rows: Sequence[int]) -> EmbeddingBatch:
        """Decode the rows with these numbers, in this order."""
        table = RowReader(self).rows(np.asarray(rows, dtype=np.int64))
        return decode_rows(table, self.manifest.inputs)

    def first_by_hash(self, count: int) -> EmbeddingBatch:
        """The ``count`` rows with the smallest prompt ids: a fixed random choice of prompts.

        Raises:
            ValueError: the store has fewer rows that can be read.
        """
        index = self.index()
        rows = rows_by_hash(index)
        if self.damaged_rows == "replace":
            reader = RowReader(self)
            readable = (row for row in rows if reader.is_readable(int(reader.groups.of(row))))
            rows = np.array(list(islice(readable, count)), dtype=np.int64)
        if count > len(rows):
            raise ValueError(
                f"{count} prompts were asked of embedding store {self.uri}, which holds "
                f"{len(rows)}; ask for fewer (evaluation.prompts)"
            )
        return self.read(rows[:count].tolist())

    def empty_prompt(self) -> EmbeddingBatch:
        """The embedding of "", one row; its size is 0 x 0."""
        return self._read_single(self.manifest.empty_prompt)

    def negative_prompt(self, text: str) -> EmbeddingBatch:
        """The embedding of a recipe's `guidance.negative_prompt`, one row; "" is the empty prompt.

        That is also what a store gives whose rows have negative prompts of their own: where they
        are used, this one isn't.

        Raises:
            StoreError: the store doesn't hold it.
        """
        self.require_negative_prompt(text)
        return self._read_single(self._negative(text) or self.manifest.empty_prompt)

    def require_negative_prompt(self, text: str) -> None:
        """Check that the store holds this negative prompt.

        Raises:
            StoreError: it doesn't; says how to add it.
        """
        own = self.manifest.inputs.negative_prompt
        if own is not None:
            if own != text:
                raise StoreError(
                    f"embedding store {self.uri} has the negative prompt {shown(repr(own))} with "
                    f"each picture, the recipe's guidance.negative_prompt is {text!r}; choose "
                    "another embed.store and run `piflow embed`, or set it to the store's"
                )
            return
        if text and self._negative(text) is None:
            raise StoreError(
                f"embedding store {self.uri} lacks the recipe's guidance.negative_prompt "
                f"{text!r}; run `piflow embed` with this recipe: only that prompt is encoded"
            )

    def _negative(self, text: str) -> ShardEntry | None:
        path = negative_prompt_plan(text).path
        return next((e for e in self.manifest.negative_prompts if e.path == path), None)

    def _read_single(self, entry: ShardEntry) -> EmbeddingBatch:
        table = _read_row_group(self, entry, 0, _open_shard(self, entry), None)
        return decode_rows(table, self.manifest.inputs)


def rows_by_hash(index: pa.Table) -> NDArray[np.int64]:
    """The row numbers of a store's index, by prompt id."""
    order = np.argsort(np.array(index["prompt_id"].to_pylist()), kind="stable")
    return index["row"].to_numpy()[order]


class RowReader:
    """Reads rows by number; keeps the row groups used last, and no file open.

    Holds no torch and no Ray object, so it starts fast in a reading process.

    Args:
        columns: to read; default: all.
        kept_groups: row groups of each bucket that stay in memory: more than are in use at a time,
            and few enough that freed memory is used again, since fresh memory costs as much time
            as reading does.
    """

    def __init__(
        self, store: EmbeddingStore, columns: list[str] | None = None, kept_groups: int = 16
    ) -> None:
        self._store = store
        self._columns = columns
        self._kept_groups = kept_groups
        # by bucket, then row group
        self._cache: dict[int, OrderedDict[int, Future[pa.RecordBatch]]] = {}
        self._metadata: dict[int, pq.FileMetaData] = {}  # of shards, as far as they were opened
        self._opening: dict[int, Lock] = {}  # of shards
        self._stamps: dict[int, tuple[int, int]] = {}  # size and time of shards, when first opened
        self.groups = RowGroups(store.manifest)
        self.damaged: set[int] = set()  # row groups

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        shards = self._store.manifest.shards
        return [(s, g) for s, entry in enumerate(shards) for g in range(len(entry.row_groups))]

    def group_name(self, group: int) -> str:
        """A row group as messages name it."""
        shard, number = self._groups[group]
        return f"row group {number} of {self._store.manifest.shards[shard].path}"

    def is_readable(self, group: int) -> bool:
        """Whether a row group is there and whole; it is tried twice before it is given up.

        Raises:
            StoreError: the storage doesn't answer, which says nothing of the row group.
        """
        for _ in range(2):
            if group in self.damaged:
                return False
            try:
                self._row_groups([group])
            except DamageError:
                continue
            return True
        self.damaged.add(group)
        return False

    def rows(
        self, numbers: NDArray[np.int64], following: NDArray[np.int64] | None = None
    ) -> pa.Table:
        """The rows with these numbers as they lie on disk, in this order.

        Args:
            numbers: of the rows.
            following: rows that will be asked for next; reading their row groups is begun.

        Raises:
            StoreError: a row group can't be read; names shard and row group.
        """
        found = np.unique(self.groups.of(numbers)).tolist()
        return take_rows(self._row_groups(found, following), self.groups, numbers)

    def _row_groups(
        self, numbers: list[int], following: NDArray[np.int64] | None = None
    ) -> dict[int, pa.RecordBatch]:
        """Row groups by number; those that aren't in memory are read side by side."""
        started = self._start(numbers)
        if following is not None:
            upcoming = np.unique(self.groups.of(following)).tolist()
            self._start([group for group in upcoming if group not in self.damaged])
        found = {}
        for number, reading in started.items():
            try:
                found[number] = reading.result()
            except BaseException:
                self._cache_of(number).pop(number, None)  # whoever asks again has it read again
                raise
        return found

    def _start(self, numbers: list[int]) -> dict[int, Future[pa.RecordBatch]]:
        """Row groups that are in memory or on their way there; those started last stay longest."""
        started = {}
        for number in numbers:
            kept = self._cache_of(number)
            if number not in kept:
                kept[number] = self._pool.submit(self._read, number)
            kept.move_to_end(number)
            started[number] = kept[number]
            if len(kept) > max(self._kept_groups, len(numbers)):
                kept.popitem(last=False)
        return started

    def close(self) -> None:
        """End what is read ahead; returns once no read is under way."""
        self._pool.shutdown(cancel_futures=True)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The store's file system and folder: one client for all files."""
        return storage.filesystem(self._store.uri)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READS, thread_name_prefix="row-groups")

    def _cache_of(self, number: int) -> OrderedDict[int, Future[pa.RecordBatch]]:
        """The row groups in memory, or on their way there, of a row group's bucket."""
        shard, group = self._groups[number]
        bucket = self._store.manifest.shards[shard].row_groups[group].bucket
        return self._cache.setdefault(bucket, OrderedDict())

    def _file(self, shard: int) -> ParquetFile:
        if shard not in self._metadata:
            with self._opening.setdefault(shard, Lock()):  # each file's end is read once
                if shard not in self._metadata:
                    self._metadata[shard] = self._opened(shard).metadata
        return self._opened(shard)

    def _opened(self, shard: int) -> ParquetFile:
        entry = self._store.manifest.shards[shard]
        system, folder = self._place
        place = system, f"{folder}/{entry.path}"
        self._require_unchanged(shard, entry, place)
        return _open_shard(self._store, entry, self._metadata.get(shard), place)

    def _require_unchanged(self, shard: int, entry: ShardEntry, place: tuple[Any, str]) -> None:
        """Notice that a shard was replaced since it was opened first; its footer is kept from then.

        Raises:
            ContradictionError: its content isn't the manifest's any more.
        """
        try:
            info = place[0].get_file_info(place[1])
        except OSError:
            return  # whoever opens the file will say so
        stamp = info.size, info.mtime_ns
        if info.size is None or self._stamps.setdefault(shard, stamp) == stamp:
            return
        with _named(entry.path, self._store.uri):
            if storage.sha256(storage.join(self._store.uri, entry.path)) != entry.sha256:
                raise ContradictionError("it was replaced while it was in use")
        self._stamps[shard] = stamp  # somebody wrote the same bytes once more

    def _read(self, number: int) -> pa.RecordBatch:
        shard, group = self._groups[number]
        entry, file = self._store.manifest.shards[shard], self._file(shard)
        table = _read_row_group(self._store, entry, group, file, self._columns)
        return table.combine_chunks().to_batches()[0]


def take_rows(
    groups: dict[int, pa.RecordBatch], numbering: RowGroups, rows: NDArray[np.int64]
) -> pa.Table:
    """Rows by number, in this order, out of the row groups that they are in."""
    found, owners = np.unique(numbering.of(rows), return_inverse=True)
    return cut_rows([groups[group] for group in found.tolist()], owners, numbering.places(rows))


def _open_shard(
    store: EmbeddingStore,
    entry: ShardEntry,
    metadata: pq.FileMetaData | None = None,
    place: tuple[Any, str] | None = None,
) -> ParquetFile:
    """A shard, whose footer is compared with the manifest unless it is given as `metadata`."""
    uri, path = storage.join(store.uri, entry.path), entry.path
    try:
        with storage.explained(uri):
            file = open_parquet(uri, require_pages, metadata, place)
    except (pa.ArrowException, OSError) as error:
        raise _trouble(store.uri, path)(
            f"cannot open {path} of embedding store {store.uri}: {shown(error)}; if it is "
            f"damaged, {REMEDY}"
        ) from error
    if metadata is None:
        manifest = store.manifest
        with _named(path, store.uri):
            require_footer(file, entry, manifest.inputs, manifest.buckets)
    return file


@contextmanager
def _named(what: str, store_uri: str) -> Iterator[None]:
    """Contradictions with the name of what contradicts the manifest."""
    try:
        yield
    except (ContradictionError, ForeignDataError) as error:
        raise ContradictionError(
            f"{what} of embedding store {store_uri} isn't what the manifest says: {error}; delete "
            "the file and run `piflow embed` again: only what is missing is made anew"
        ) from error


def _trouble(store_uri: str, path: str) -> type[StoreError]:
    """Whose fault it is that a file can't be read: its own, if the storage answers for it."""
    system, name = storage.filesystem(storage.join(store_uri, path))
    try:
        with system.open_input_file(name) as file:
            file.read(1)
    except FileNotFoundError:
        return DamageError
    except OSError:
        return StoreError
    return DamageError


def _read_row_group(
    store: EmbeddingStore,
    entry: ShardEntry,
    group: int,
    file: ParquetFile,
    columns: list[str] | None,
) -> pa.Table:
    """A row group's rows, compared with the manifest."""
    path, manifest = entry.path, store.manifest
    try:
        table = _read_again(storage.join(store.uri, path), group, file, columns)
    except (pa.ArrowException, OSError, ForeignDataError) as error:
        raise _trouble(store.uri, path)(
            f"cannot read row group {group} of {path} in embedding store {store.uri}: "
            f"{shown(error)}; if it is damaged, {REMEDY}"
        ) from error
    single = entry in manifest.singles
    bucket = None if single else manifest.buckets[entry.row_groups[group].bucket]
    with _named(f"row group {group} of {path}", store.uri):
        require_rows(table, entry, group, manifest.inputs, bucket)
    return table


def _read_again(uri: str, group: int, file: ParquetFile, columns: list[str] | None) -> pa.Table:
    """A row group; if it can't be read, from the file opened anew: keys may have been renewed."""
    try:
        return file.read_row_group(group, columns)
    except OSError:
        with storage.explained(uri):
            return open_parquet(uri, require_pages, file.metadata).read_row_group(group, columns)
