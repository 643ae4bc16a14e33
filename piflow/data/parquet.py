"""Opens Parquet files on any storage, and reads what piflow writes into their footers.

A file may come from anybody, so a row group's columns are first read as they lie in the file, then
their pages' headers are looked at, and only then are those very bytes given to the decoder.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from piflow import storage
from piflow.data.parquet_pages import Pages, read_pages
from piflow.storage.foreign import ForeignDataError, parse_object, shown

METADATA_KEY = b"piflow"  # of a shard's footer: JSON that says what its rows were made from

MAX_FOOTER_BYTES = 2**28

_GAP_BYTES = 2**13  # between columns, read along with them rather than asked for again
_TAIL_BYTES = 2**16  # of a file, read at once: the footer, its size and "PAR1" at the end


class ParquetFile:
    """A Parquet file whose pages' headers are checked before anything is unpacked.

    Args:
        source: the file, open for reading at any place.
        check: told each column that is about to be decoded, by its footer's entry, and what its
            page headers say; raises ValueError if that is too much.
        metadata: the footer, if it is known.
        where: what the messages of a ForeignDataError begin with.
        options: of `pyarrow.parquet.ParquetFile`.

    Raises:
        ForeignDataError: the footer is too large. pyarrow's errors say what is damaged.
    """

    def __init__(
        self,
        source: Any,
        check: Callable[[pq.ColumnChunkMetaData, Pages], None],
        metadata: pq.FileMetaData | None = None,
        where: str = "",
        **options: Any,
    ) -> None:
        self._source, self._check, self._where = source, check, where
        self.metadata = _footer(source, where) if metadata is None else metadata
        self._spans = _Spans(source.size())
        self._file = pq.ParquetFile(
            pa.PythonFile(self._spans, mode="r"), metadata=self.metadata, **options
        )

    @property
    def schema_arrow(self) -> pa.Schema:
        return self._file.schema_arrow

    @property
    def num_row_groups(self) -> int:
        return self.metadata.num_row_groups

    def read_row_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A row group's columns; all of them by default.

        Without Arrow's threads: piflow reads row groups side by side, and Arrow has one thread
        where `OMP_NUM_THREADS` is 1, as Ray sets it.

        Raises:
            ForeignDataError: a page's header isn't one. `check` and pyarrow raise their own errors.
            OSError: the storage refused or didn't answer.
        """
        self._load(group, columns)
        return self._file.read_row_group(group, columns=columns, use_threads=False)

    def batches(
        self, group: int, columns: Sequence[str], max_rows: int, max_bytes: int
    ) -> Iterator[pa.RecordBatch]:
        """A row group's columns without lists, at most `max_rows` rows at a time.

        A batch has so few rows that none of its columns takes more than `max_bytes`, or two pages.

        Raises:
            ForeignDataError, OSError: as `read_row_group`.
        """
        pages = self._load(group, columns)
        rows = min([max_rows, *(found.rows_within(max_bytes) for found in pages)])
        return iter(self._file.iter_batches(rows, row_groups=[group], columns=columns))

    def chunks(
        self, group: int, columns: Sequence[str] | None = None
    ) -> Iterator[pq.ColumnChunkMetaData]:
        """The footer's entries of a row group's columns; those of a struct have several."""
        metadata = self.metadata.row_group(group)
        for number in range(metadata.num_columns):
            chunk = metadata.column(number)
            path = chunk.path_in_schema
            if columns is None or any(path == c or path.startswith(f"{c}.") for c in columns):
                yield chunk

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, group: int, columns: Sequence[str] | None) -> list[Pages]:
        """Read a row group's columns and check their pages."""
        chunks = list(self.chunks(group, columns))
        ranges = [self._range(chunk) for chunk in chunks]
        self._spans.replace(
            [(start, self._source.read_at(end - start, start)) for start, end in _joined(ranges)]
        )
        found = []
        for (start, end), chunk in zip(ranges, chunks, strict=True):
            try:
                pages = read_pages(self._spans.part(start, end - start), chunk.num_values)
                self._check(chunk, pages)
            except ForeignDataError as error:
                raise ForeignDataError(
                    f"{self._where}column {shown(repr(chunk.path_in_schema))} of row group "
                    f"{group}: {error}"
                ) from error
            found.append(pages)
        return found

    def _range(self, chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
        """Where a column begins and ends in the file."""
        start, size = chunk.data_page_offset, self._source.size()
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
            start = chunk.dictionary_page_offset
        end = start + chunk.total_compressed_size
        if not 0 <= start <= end <= size:
            raise ForeignDataError(
                f"{self._where}column {shown(repr(chunk.path_in_schema))} lies in bytes {start} to "
                f"{end} by the footer, but the file has {size}"
            )
        return start, end


def open_parquet(
    uri: str,
    check: Callable[[pq.ColumnChunkMetaData, Pages], None],
    metadata: pq.FileMetaData | None = None,
    place: tuple[Any, str] | None = None,
) -> ParquetFile:
    """A shard of an embedding store; `check` as in `ParquetFile`, `place` if it is known."""
    system, path = place or storage.filesystem(uri)
    source = system.open_input_file(path)
    return ParquetFile(source, check, metadata, page_checksum_verification=True)


def shard_facts(file: ParquetFile) -> dict[str, Any]:
    """What `write_shard` says of a shard in its footer; {} if it says nothing.

    Raises:
        ForeignDataError: it isn't a JSON object, or one that is too large.
    """
    content = (file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}")
    return parse_object(content, where="the footer")


def _footer(source: Any, where: str) -> pq.FileMetaData:
    file_size = source.size()
    start = max(0, file_size - _TAIL_BYTES)
    tail = source.read_at(file_size - start, start)
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if MAX_FOOTER_BYTES < size <= file_size:
        raise ForeignDataError(f"{where}the footer has {size} bytes, at most {MAX_FOOTER_BYTES}")
    if len(tail) < size <= file_size:
        start = file_size - size
        tail = source.read_at(size, start)
    spans = _Spans(file_size)
    spans.replace([(start, tail)])
    return pq.read_metadata(pa.PythonFile(spans, mode="r"))


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges that hold all these, one for those with no more than a small gap between them."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1] + _GAP_BYTES:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


class _Spans(io.RawIOBase):
    """A file of which only some spans are there, in memory: all that a decoder gets to see."""

    def __init__(self, size: int) -> None:
        self._size, self._place = size, 0
        self._spans: list[tuple[int, bytes]] = []

    def replace(self, spans: list[tuple[int, bytes]]) -> None:
        self._spans = spans

    def part(self, start: int, size: int) -> memoryview:
        for first, content in self._spans:
            if first <= start and start + size <= first + len(content):
                return memoryview(content)[start - first : start - first + size]
        raise ForeignDataError(f"{size} bytes from {start} are asked for, which no column has")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> memoryview:
        content = self.part(self._place, self._size - self._place if size < 0 else size)
        self._place += len(content)
        return content

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
