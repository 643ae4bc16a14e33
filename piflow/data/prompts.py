"""Read prompts from a text, JSON-lines, CSV or Parquet file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from piflow import storage

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """A text and the size in pixels of the pictures that it stands for."""

    text: str
    height: int
    width: int

    @property
    def prompt_id(self) -> str:
        """16 hex digits of the sha256 of size and text: the same in every file and store."""
        key = f"{self.height}x{self.width}\n{self.text}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts in file order, and how many repeated ones were left out."""

    prompts: tuple[Prompt, ...]
    duplicates: int

    @property
    def digest(self) -> str:
        """Hex sha256 of all prompts in their order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.prompt_id.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Record:
    """One entry of a file: where it stands ("line 3"), and its columns."""

    place: str
    columns: dict[str, Any]


def read_prompts(uri: str, *, column: str = "prompt", height: int, width: int) -> PromptSet:
    """Read a prompts file.

    A ``.txt`` file holds one prompt a line. The other formats have columns: ``column`` holds the
    text, and optional ``height`` and ``width`` columns override the given size row by row. Blanks
    around a text are stripped; the same text at the same size counts once.

    Args:
        uri: a ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file, local or on S3, in UTF-8.
        column: name of the text's column; ignored for ``.txt``.
        height: pixels, where the file has no ``height`` column.
        width: pixels, where the file has no ``width`` column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown format, missing column, unreadable content, a blank prompt (names file
            and line or row), a wrong size, or no prompt at all.
    """
    kind = storage.suffix(uri)
    if kind not in FORMATS:
        raise ValueError(f"prompts file {uri} has ending {kind!r}; supported: {', '.join(FORMATS)}")
    content = storage.read_bytes(uri)
    if kind == ".txt":
        column = "prompt"
    distinct: dict[Prompt, None] = {}
    count = 0
    for record in _records(kind, content, uri, column):
        distinct[_to_prompt(record, uri, column, height, width)] = None
        count += 1
    if not distinct:
        raise ValueError(f"prompts file {uri} holds no prompt")
    return PromptSet(tuple(distinct), count - len(distinct))


def _records(kind: str, content: bytes, uri: str, column: str) -> Iterator[_Record]:
    if kind == ".parquet":
        return _parquet_records(content, uri, column)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {uri} is not UTF-8 text: {error}") from error
    readers = {".txt": _text_records, ".jsonl": _json_records, ".csv": _csv_records}
    return readers[kind](text, uri, column)


def _lines(text: str) -> list[str]:
    """Lines without their ends; the line end that closes the file starts no further line."""
    lines = text.split("\n")
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _text_records(text: str, uri: str, column: str) -> Iterator[_Record]:
    for number, line in enumerate(_lines(text), 1):
        yield _Record(f"line {number}", {column: line})


def _json_records(text: str, uri: str, column: str) -> Iterator[_Record]:
    for number, line in enumerate(_lines(text), 1):
        place = f"line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts file {uri}, {place}: not valid JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(
                f'prompts file {uri}, {place}: expected an object like {{"{column}": "…"}}, '
                f"got {line[:60]!r}"
            )
        yield _Record(place, entry)


def _csv_records(text: str, uri: str, column: str) -> Iterator[_Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    _require_column(column, list(reader.fieldnames or []), uri)
    try:
        for row in reader:
            extra = row.pop(None, None)  # DictReader's key of surplus fields
            if extra is not None:
                raise ValueError(
                    f"prompts file {uri}, line {reader.line_num}: more fields than the header has; "
                    "quote texts that hold commas"
                )
            yield _Record(f"line {reader.line_num}", row)
    except csv.Error as error:
        raise ValueError(f"prompts file {uri}, line {reader.line_num}: {error}") from error


def _parquet_records(content: bytes, uri: str, column: str) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        names = file.schema_arrow.names
        _require_column(column, names, uri)
        wanted = [name for name in (column, "height", "width") if name in names]
        rows = file.read(columns=wanted).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"prompts file {uri} is not readable Parquet: {error}") from error
    for number, row in enumerate(rows, 1):
        yield _Record(f"row {number}", row)


def _require_column(column: str, available: list[str], uri: str) -> None:
    if column not in available:
        raise ValueError(
            f"prompts file {uri} has no column {column!r}; available: "
            f"{', '.join(available) or 'none'}; set embed.prompt_column"
        )


def _to_prompt(record: _Record, uri: str, column: str, height: int, width: int) -> Prompt:
    where = f"prompts file {uri}, {record.place}"
    if column not in record.columns:
        raise ValueError(
            f"{where}: no column {column!r}; available: {', '.join(record.columns) or 'none'}; "
            "set embed.prompt_column"
        )
    text = record.columns[column]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"{where}: the prompt is blank; remove it or write a text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: the prompt must be a text, got {text!r}")
    sizes = {
        name: _to_pixels(record.columns.get(name), default, name, where)
        for name, default in (("height", height), ("width", width))
    }
    return Prompt(text.strip(), **sizes)


def _to_pixels(value: Any, default: int, name: str, where: str) -> int:
    if value is None or value == "":
        return default
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{where}: {name} must be a positive number of pixels, got {value!r}")
    return value
