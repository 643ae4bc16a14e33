"""Rows of one prompts file: text, CSV, JSON lines or Parquet, read piece by piece.

Files come from anywhere, so what a row may take in memory is limited before it is taken: a line by
its bytes, whatever a packed file unpacks to; a Parquet file's pages by their headers, and its
repeated values stay a dictionary until their lengths are known. Every refusal names the file and
the line or row.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from piflow import storage
from piflow.storage.foreign import ForeignDataError, parse_json, refuse_lfs_pointer, shown
from piflow.storage.picture import MAX_PICTURE_BYTES

if TYPE_CHECKING:
    from piflow.data.parquet import ParquetFile
    from piflow.data.parquet_pages import Pages

MAX_PROMPT_BYTES = 64 * 2**10
"""Of one text in UTF-8: encoders take a few KiB, and cut off the rest."""

MAX_LINE_BYTES = 16 * 2**20
"""Of a line, or of a CSV row that spans lines, with all columns."""

MAX_CHUNK_BYTES = 4 * 2**30
"""Of a wanted column in one row group of a Parquet file, packed or unpacked."""

MAX_PAGE_BYTES = 2**28
"""Of a Parquet page, unpacked; larger ones may unpack to 8 times their column's packed bytes."""

MAX_DICTIONARY = 2**24
"""Values in a Parquet dictionary; each takes 16 bytes of memory even if it is empty."""

_READ_BYTES = 4 * 2**20  # one request to an object store
_BATCH_ROWS = 1024
_BATCH_ROWS_WITH_PICTURES = 64  # which may hold megabytes each
_BATCH_BYTES = 2**28  # of a column
_PAGE_RATIO = 8
_HEAD_BYTES = 64


class Row(NamedTuple):
    """A row as it came."""

    number: int  # in the file, from 1
    text: Any
    height: Any
    width: Any
    picture: Any
    condition: Any = None


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read."""

    text: str
    height: str | None
    width: str | None
    picture: str | None
    condition: str | None = None

    @property
    def places(self) -> tuple[str | None, ...]:
        """In the order of a `Row`."""
        return (self.text, self.height, self.width, self.picture, self.condition)

    @property
    def optional(self) -> list[str]:
        """Those that a line may lack."""
        return [name for name in self.places[1:] if name is not None]

    @property
    def names(self) -> list[str]:
        """All, each once."""
        return list(dict.fromkeys([self.text, *self.optional]))

    def key_of(self, name: str) -> str:
        """The recipe's key that named a column."""
        keys = ("prompt", "height", "width", "image", "condition")
        return f"embed.{keys[self.places.index(name)]}_column"


def read_rows(uri: str, columns: Columns) -> Iterator[Row]:
    """The rows of a file whose format its ending names.

    Raises:
        ValueError: missing or repeated columns, content of another format or encoding, or a line or
            value over its limit.
        OSError: the storage refused or didn't answer.
    """
    with storage.explained(uri):
        yield from _READERS[storage.suffix(uri).removesuffix(".gz")](uri, columns)


def text_lines(uri: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file without their ends, numbered from 1.

    Raises:
        ValueError: as `read_rows`.
    """
    lines = _Lines(uri)
    for number, line in enumerate(lines, 1):
        lines.pending = 0
        text = line.rstrip("\r\n")
        if "\r" in text:
            raise ForeignDataError(
                f"prompts file {uri}, line {number}: a carriage return within the line; if it is "
                "meant to end a line, convert the file: tr '\\r' '\\n'"
            )
        yield number, text


class _Lines:
    """Lines with their ends, read and unpacked piece by piece."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.pending = 0  # bytes since the reader of the lines last said that a row is complete

    def __iter__(self) -> Iterator[str]:
        system, path = storage.filesystem(self._uri)
        number = 0
        with system.open_input_stream(path, compression=None) as raw:
            stream = io.BufferedReader(raw, _READ_BYTES)
            where = f"prompts file {self._uri}"
            refuse_lfs_pointer(stream.peek(_HEAD_BYTES)[:_HEAD_BYTES], where=where)
            if storage.suffix(self._uri).endswith(".gz"):
                stream = io.BufferedReader(gzip.GzipFile(fileobj=stream))
            try:
                while line := stream.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    yield self._decoded(line, f"{where}, line {number}")
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ForeignDataError(
                    f"{where}, after line {number}: not valid gzip ({shown(error)})"
                ) from error

    def _decoded(self, line: bytes, where: str) -> str:
        self.pending += len(line)
        if self.pending > MAX_LINE_BYTES:
            raise ForeignDataError(
                f"{where}: more than {MAX_LINE_BYTES} bytes in one line or row; check that each "
                "prompt stands on its own line and that quotes are closed"
            )
        if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ForeignDataError(
                f"{where}: not UTF-8 text (NUL characters, or UTF-16's mark); convert the file: "
                "iconv -f UTF-16 -t UTF-8"
            )
        try:  # a byte order mark also begins a line within where files were joined
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ForeignDataError(f"{where}: not UTF-8 text ({error})") from error


def _text_rows(uri: str, columns: Columns) -> Iterator[Row]:
    for name in columns.optional:
        raise ValueError(
            f"prompts file {uri} has no columns, but {columns.key_of(name)} is {name!r}; leave it "
            "empty, or give a file with columns"
        )
    for number, text in text_lines(uri):
        yield Row(number, text, None, None, None)


def _json_rows(uri: str, columns: Columns) -> Iterator[Row]:
    absent = set(columns.optional)  # a line may lack them, but if all lines do it is a mistake
    lines = _Lines(uri)
    number = 0
    for number, line in enumerate(lines, 1):
        lines.pending = 0
        where = f"prompts file {uri}, line {number}"
        entry = parse_json(line, where=where)
        if not isinstance(entry, dict):
            raise ForeignDataError(
                f'{where}: expected an object like {{"{columns.text}": "…"}}, got {line[:60]!r}'
            )
        if columns.text not in entry:
            _require_columns([columns.text], list(entry), where, columns)
        if absent:
            absent -= entry.keys()
        yield Row(number, *(entry.get(name) for name in columns.places))
    if number and absent:
        raise ValueError(
            f"prompts file {uri}: no line has {' or '.join(sorted(absent))}; check "
            f"{' and '.join(columns.key_of(name) for name in sorted(absent))}"
        )


def _csv_rows(uri: str, columns: Columns) -> Iterator[Row]:
    lines = _Lines(uri)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        _require_columns(columns.names, header, f"prompts file {uri}", columns)
        wanted = [  # the place beyond the last column holds ""
            len(header) if name is None else header.index(name) for name in columns.places
        ]
        end = reader.line_num
        lines.pending = 0
        for row in reader:
            lines.pending = 0
            start, end = end + 1, reader.line_num  # a quoted text may span lines
            if len(row) > len(header):
                raise ForeignDataError(
                    f"prompts file {uri}, line {start}: more fields than the header has; quote "
                    "texts that hold commas"
                )
            if row:  # the reader's form of an empty line is []
                row += [""] * (len(header) + 1 - len(row))
                yield Row(start, *(row[place] for place in wanted))
    except csv.Error as error:
        raise ForeignDataError(f"prompts file {uri}, line {reader.line_num}: {error}") from error


def _parquet_rows(uri: str, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa

    where = f"prompts file {uri}"
    start = 1
    try:
        with closing(open_parquet(uri, columns.names, where=where)) as file:
            _require_columns(columns.names, file.schema_arrow.names, where, columns)
            _require_types(file.schema_arrow, columns.names, where)
            with_pictures = columns.picture or columns.condition
            most_rows = _BATCH_ROWS_WITH_PICTURES if with_pictures else _BATCH_ROWS
            for group in range(file.num_row_groups):
                pictures = [0, 0]  # bytes of both columns
                for batch in file.batches(group, columns.names, most_rows, _BATCH_BYTES):
                    numbers = range(start, start + len(batch))
                    values = [
                        [None] * len(batch) if name is None else _values(batch, name, where, start)
                        for name in columns.places
                    ]
                    for place, name in enumerate((columns.picture, columns.condition)):
                        pictures[place] += sum(_num_bytes(value) for value in values[place - 2])
                        _require_chunk(pictures[place], name, group, where)
                    yield from map(Row._make, zip(numbers, *values, strict=True))
                    start += len(batch)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ForeignDataError(f"{where} is not readable Parquet: {shown(error)}") from error


def open_parquet(uri: str, columns: list[str], *, where: str) -> ParquetFile:
    """A Parquet file whose texts and bytes are read as dictionaries: repeated ones stay one.

    Raises:
        ValueError: a Git LFS pointer, or one of the columns is too large in a row group.
        OSError: the storage refused or didn't answer. pyarrow's errors say what is damaged.
    """
    from piflow.data.parquet import ParquetFile

    system, path = storage.filesystem(uri)
    source = system.open_input_file(path)
    refuse_lfs_pointer(source.read_at(min(_HEAD_BYTES, source.size()), 0), where=where)
    begin = f"{where}: "
    footer = ParquetFile(source, _require_pages, where=begin)
    texts = set(columns)
    for group in range(footer.num_row_groups):
        for chunk in footer.chunks(group, columns):
            size = max(chunk.total_uncompressed_size, chunk.total_compressed_size)
            _require_chunk(size, chunk.path_in_schema, group, where)
            if any(encoding.startswith("DELTA") for encoding in chunk.encodings):
                texts.discard(chunk.path_in_schema)  # pyarrow 25 can't read it as a dictionary
    # nor can it read one inside of a struct from several row groups
    schema = footer.metadata.schema
    texts &= {schema.column(number).path for number in range(len(schema))}
    return ParquetFile(
        source, _require_pages, footer.metadata, begin, read_dictionary=sorted(texts)
    )


def _require_pages(chunk: Any, pages: Pages) -> None:
    most = max(MAX_PAGE_BYTES, _PAGE_RATIO * chunk.total_compressed_size)
    if pages.largest > most:
        raise ForeignDataError(
            f"a page takes {pages.largest} bytes unpacked, at most {most}; write the file with "
            "smaller pages or row groups"
        )
    if pages.dictionary_values > MAX_DICTIONARY:
        raise ForeignDataError(
            f"a dictionary of {pages.dictionary_values} values, at most {MAX_DICTIONARY}; write "
            "the file without one, or with smaller row groups"
        )
    if pages.total > MAX_CHUNK_BYTES:
        raise ForeignDataError(
            f"its pages take {pages.total} bytes unpacked, at most {MAX_CHUNK_BYTES}; write the "
            "file with smaller row groups"
        )


def _require_chunk(size: int, column: str | None, group: int, where: str) -> None:
    if size > MAX_CHUNK_BYTES:
        raise ForeignDataError(
            f"{where}: column {shown(repr(column))} takes more than {MAX_CHUNK_BYTES} bytes in row "
            f"group {group}, and a row group is read at once; write the file with smaller ones"
        )


def _num_bytes(picture: Any) -> int:
    content = picture.get("bytes") if isinstance(picture, dict) else picture
    return len(content) if isinstance(content, bytes) else 0


def _values(batch: Any, name: str, where: str, start: int) -> list[Any]:
    """A column's values, once the lengths of all its texts are known."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = batch.column(name)
    if isinstance(column, pa.StructArray):  # a picture, as the datasets library writes it
        for child in column.flatten():
            _require_short(child, name, where, start)
        return list(column.to_pylist())
    _require_short(column, name, where, start)
    if not isinstance(column, pa.DictionaryArray):
        return list(column.to_pylist())
    found: dict[int | None, Any] = {
        number: _decoded_value(column.dictionary[number], where, start, column, number)
        for number in pc.unique(column.indices.drop_null()).to_pylist()
    }
    return [found.get(number) for number in column.indices.to_pylist()]


def _require_types(schema: Any, names: list[str], where: str) -> None:
    """Refuse columns of lists and the like, of which one row may hold any number of values."""
    import pyarrow as pa

    for name in names:
        kind = schema.field(name).type
        fields = [field.type for field in kind] if pa.types.is_struct(kind) else [kind]
        for found in map(_plain_type, fields):
            text = pa.types.is_string(found) or pa.types.is_large_string(found)
            number = pa.types.is_primitive(found) or pa.types.is_null(found)
            if not (text or number or _is_bytes(found)):
                raise ForeignDataError(
                    f"{where}: column {shown(repr(name))} holds {shown(kind)}; expected texts, "
                    "numbers, or pictures as bytes"
                )


def _plain_type(kind: Any) -> Any:
    """The type of a dictionary's values, and what a type with a name of its own is stored as."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    return _plain_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _require_short(column: Any, name: str, where: str, start: int) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.dictionary if isinstance(column, pa.DictionaryArray) else column
    if pa.types.is_primitive(values.type) or pa.types.is_null(values.type):
        return
    most = MAX_PICTURE_BYTES if _is_bytes(values.type) else MAX_LINE_BYTES
    longest = pc.max(pc.binary_length(values)).as_py() or 0
    if longest > most:
        raise ForeignDataError(
            f"{where}, rows from {start}: a value of column {shown(repr(name))} has {longest} "
            f"bytes; at most {most}"
        )


def _decoded_value(value: Any, where: str, start: int, column: Any, number: int) -> Any:
    """A dictionary's value; Parquet doesn't see to it that a string is UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        row = start + column.indices.to_pylist().index(number)
        raise ForeignDataError(f"{where}, row {row}: not UTF-8 text ({error})") from error


def _require_columns(wanted: list[str], available: list[str], where: str, columns: Columns) -> None:
    for name in wanted:
        if name not in available:
            there = shown(", ".join(available), 500) or "none"
            raise ForeignDataError(
                f"{where} has no column {name!r}; available: {there}; set {columns.key_of(name)}"
            )
        if available.count(name) > 1:
            raise ForeignDataError(
                f"{where} has {available.count(name)} columns of the name {name!r}; rename all but "
                "one"
            )


_READERS: dict[str, Callable[[str, Columns], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
