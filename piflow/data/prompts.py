"""Read prompts: text, CSV, JSON lines or Parquet; one file, a pattern or a dataset folder.

::

    embed.prompts ──▶ prompt_files: files, in order ──▶ rows: number, text, height, width
                                                             │ checked, sized
                                                 distinct prompts in order of appearance

Files are streamed through `piflow.storage`, line by line or in Parquet batches of the wanted
columns only: what stays in memory is the distinct prompts.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from piflow import storage

COLUMN_FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
FORMATS = (".txt", ".txt.gz", *COLUMN_FORMATS)
DATASET_FOLDERS = ("", "data", "train", "data/train")
"""Where the files of a dataset folder may lie."""

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # words that name a split, as in the Hugging Face datasets library
_READ_BYTES = 4 * 2**20  # one request to an object store
_BATCH_ROWS = 1024

_Row = tuple[int, Any, Any, Any]  # number in the file from 1; text, height and width as they came


@dataclass(frozen=True, slots=True)
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
class _Columns:
    text: str
    height: str | None
    width: str | None

    @property
    def sizes(self) -> list[str]:
        return [name for name in (self.height, self.width) if name is not None]

    @property
    def names(self) -> list[str]:
        return [self.text, *self.sizes]


def read_prompts(
    uri: str,
    *,
    column: str = "prompt",
    height: int,
    width: int,
    height_column: str | None = None,
    width_column: str | None = None,
    buckets: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> PromptSet:
    """Read the prompts of one or many files.

    ``.txt`` files hold one prompt a line, the other formats have columns. Blanks around a text are
    stripped; the same text at the same size counts once. A prompt's picture size is, in this order,
    its own (``height_column`` and ``width_column``, where they aren't empty), a bucket by
    `choose_bucket`, or ``height`` x ``width``.

    Args:
        uri: a file, local or on S3, in UTF-8; a pattern, whose files are read in order of their
            names; or a dataset folder (`prompt_files`). Formats: `FORMATS`.
        column: name of the text's column; ignored for ``.txt``.
        height: pixels.
        width: pixels.
        height_column: name of the column of heights in pixels; None: prompts bring no size.
        width_column: the same for widths; both or neither.
        buckets: (height, width) pairs in pixels; empty: all prompts get ``height`` x ``width``.
        seed: of the choice among buckets.

    Raises:
        FileNotFoundError: there is no such file or folder, or nothing matches the pattern.
        ValueError: unknown format, missing column, unreadable content, a blank prompt, a text or
            size of a wrong type (these name file and line or row), or no prompt at all.
    """
    if (height_column is None) != (width_column is None):
        raise ValueError(
            f"height_column is {height_column!r}, width_column is {width_column!r}; give both or "
            "neither"
        )
    columns = _Columns(column, height_column, width_column)

    def default_size(text: str) -> tuple[int, int]:
        return choose_bucket(text, buckets, seed) if buckets else (height, width)

    distinct: dict[Prompt, None] = {}
    count = 0
    for file in prompt_files(uri):
        for prompt in _read_file(file, columns, default_size):
            distinct[prompt] = None
            count += 1
    if not distinct:
        raise ValueError(f"prompts file {uri} holds no prompt")
    return PromptSet(tuple(distinct), count - len(distinct))


def choose_bucket(text: str, buckets: Sequence[Sequence[int]], seed: int) -> tuple[int, int]:
    """One of the (height, width) pairs: a function of text, buckets and seed, and nothing else.

    All positions in ``buckets`` are equally likely over texts, so a pair that stands there twice
    is chosen twice as often.
    """
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    height, width = buckets[int.from_bytes(digest[:8], "big") % len(buckets)]
    return height, width


# ------------------------------------------------------------------------------------ which files


def prompt_files(uri: str) -> list[str]:
    """The files that ``embed.prompts`` stands for, in the order of reading.

    A pattern (`storage.expand`) stands for the files that it matches, sorted by path.

    A folder is read as a Hugging Face dataset: its Parquet, JSON-lines or CSV files, which lie in
    the folder itself, ``data/``, ``train/`` or ``data/train/``. A file belongs to a split if the
    name of the file or its folder holds one of the words that the datasets library knows (train,
    training; validation, valid, val, dev; test, testing, eval, evaluation). Where any file does,
    only the train split is read, else all. Files are sorted by path. ``configs`` in the folder's
    README are not followed: name other files by a pattern.

    Raises:
        FileNotFoundError: there is no such file or folder, or nothing matches the pattern.
        ValueError: a file of another format than `FORMATS`; a folder without a file to read, with
            splits but no train split, or with several formats.
    """
    files = storage.expand(uri)
    if files == [uri]:
        system, path = storage.filesystem(uri)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", uri)
        if kind == fs.FileType.Directory:
            return _dataset_files(uri)
    for file in files:
        ending = storage.suffix(file)
        if ending not in FORMATS:
            raise ValueError(
                f"prompts file {file} has ending {ending!r}; supported: {', '.join(FORMATS)}"
            )
    return files


def _dataset_files(uri: str) -> list[str]:
    found = sorted(
        f"{folder}/{name}".lstrip("/")
        for folder in DATASET_FOLDERS
        for name in storage.list_files(storage.join(uri, folder), recursive=False)
        if storage.suffix(name) in COLUMN_FORMATS and not name.startswith(".")
    )
    if not found:
        raise ValueError(
            f"dataset folder {uri} has no {', '.join(COLUMN_FORMATS)} file in itself, "
            f"{', '.join(DATASET_FOLDERS[1:])}; name the files by a pattern such as "
            f"{storage.join(uri, '**', '*.parquet')}"
        )
    splits = {name: _split(name) for name in found}
    present = sorted({split for split in splits.values() if split is not None})
    if present and "train" not in present:
        raise ValueError(
            f"dataset folder {uri} has no train split, but {', '.join(present)}; to read another "
            f"split name its files by a pattern such as {storage.join(uri, f'*{present[0]}*')}"
        )
    chosen = [name for name in found if not present or splits[name] == "train"]
    formats = sorted({storage.suffix(name).removesuffix(".gz") for name in chosen})
    if len(formats) > 1:
        raise ValueError(
            f"dataset folder {uri} has files in several formats ({', '.join(formats)}), which may "
            f"say the same; name those to read by a pattern such as *{formats[0]}"
        )
    return [storage.member(uri, name) for name in chosen]


def _split(name: str) -> str | None:
    """The split that a relative path names by its first word that is a split's, or None."""
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in _SPLITS.items():
            if word in words:
                return split
    return None


# ---------------------------------------------------------------------------------------- prompts


def _read_file(
    uri: str, columns: _Columns, default_size: Callable[[str], tuple[int, int]]
) -> Iterator[Prompt]:
    ending = storage.suffix(uri).removesuffix(".gz")
    unit = "row" if ending == ".parquet" else "line"
    for number, text, height, width in _READERS[ending](uri, columns):
        try:
            prompt = _to_prompt(text, height, width, default_size)
        except ValueError as error:
            raise ValueError(f"prompts file {uri}, {unit} {number}: {error}") from error
        yield prompt


def _to_prompt(
    text: Any, height: Any, width: Any, default_size: Callable[[str], tuple[int, int]]
) -> Prompt:
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"the prompt must be a text, got {text!r}")
    text = text.strip()
    if not text:
        raise ValueError("the prompt is blank; remove it or write a text")
    if not text.isascii():
        _require_encodable(text)
    own = _to_pixels(height, "height"), _to_pixels(width, "width")
    if own == (None, None):
        return Prompt(text, *default_size(text))
    if own[0] is None or own[1] is None:
        raise ValueError(
            f"height is {height!r} and width {width!r}; give both, or leave both empty"
        )
    return Prompt(text, own[0], own[1])


def _require_encodable(text: str) -> None:
    r"""JSON can spell half a surrogate pair ("\ud83d"), which no UTF-8 text holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt {text!r} is not valid Unicode ({error})") from error


def _to_pixels(value: Any, name: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive whole number of pixels, got {value!r}")
    return value


# ----------------------------------------------------------------------------------------- formats


def _lines(uri: str) -> Iterator[str]:
    """Lines with their ends, read and unpacked piece by piece."""
    system, path = storage.filesystem(uri)
    number = 0
    with system.open_input_stream(path, compression=None) as raw:
        stream = io.BufferedReader(raw, _READ_BYTES)
        if storage.suffix(uri).endswith(".gz"):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=stream))
        try:
            for number, line in enumerate(stream, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompts file {uri}, line {number}: not UTF-8 text ({error})"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"prompts file {uri}, after line {number}: not valid gzip ({error})"
            ) from error


def _text_rows(uri: str, columns: _Columns) -> Iterator[_Row]:
    if columns.sizes:
        raise ValueError(
            f"prompts file {uri} has no columns, but embed.height_column is {columns.height!r}; "
            "leave height_column and width_column empty"
        )
    for number, line in enumerate(_lines(uri), 1):
        yield number, line, None, None


def _json_rows(uri: str, columns: _Columns) -> Iterator[_Row]:
    absent = set(columns.sizes)  # a line may lack them, but if all lines do it is a mistake
    number = 0
    for number, line in enumerate(_lines(uri), 1):
        where = f"prompts file {uri}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(
                f'{where}: expected an object like {{"{columns.text}": "…"}}, got {line[:60]!r}'
            )
        if columns.text not in entry:
            _require_columns([columns.text], list(entry), where, columns)
        if absent:
            absent -= entry.keys()
        yield number, entry[columns.text], entry.get(columns.height), entry.get(columns.width)
    if number and absent:
        raise ValueError(
            f"prompts file {uri}: no line has {' or '.join(sorted(absent))}; check "
            "embed.height_column and embed.width_column"
        )


def _csv_rows(uri: str, columns: _Columns) -> Iterator[_Row]:
    reader = csv.reader(_lines(uri), strict=True)
    try:
        header = next(reader, [])
        _require_columns(columns.names, header, f"prompts file {uri}", columns)
        wanted = [  # the place beyond the last column holds ""
            len(header) if name is None else header.index(name)
            for name in (columns.text, columns.height, columns.width)
        ]
        end = reader.line_num
        for row in reader:
            start, end = end + 1, reader.line_num  # a quoted text may span lines
            if len(row) > len(header):
                raise ValueError(
                    f"prompts file {uri}, line {start}: more fields than the header has; quote "
                    "texts that hold commas"
                )
            if row:  # the reader's form of an empty line is []
                row += [""] * (len(header) + 1 - len(row))
                text, height, width = (row[place] for place in wanted)
                yield start, text, height, width
    except csv.Error as error:
        raise ValueError(f"prompts file {uri}, line {reader.line_num}: {error}") from error


def _parquet_rows(uri: str, columns: _Columns) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    system, path = storage.filesystem(uri)
    start = 1
    try:
        with system.open_input_file(path) as source:
            file = pq.ParquetFile(source)
            _require_columns(columns.names, file.schema_arrow.names, f"prompts file {uri}", columns)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns.names):
                texts = _to_texts(batch.column(columns.text), uri, start)
                heights, widths = (
                    [None] * len(batch) if name is None else batch.column(name).to_pylist()
                    for name in (columns.height, columns.width)
                )
                numbers = range(start, start + len(batch))
                yield from zip(numbers, texts, heights, widths, strict=True)
                start += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"prompts file {uri} is not readable Parquet: {error}") from error


def _to_texts(column: Any, uri: str, start: int) -> list[Any]:
    """The values of an Arrow array; Parquet doesn't see to it that a string is UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError as error:
        for number, value in enumerate(column, start):
            try:
                value.as_py()
            except UnicodeDecodeError:
                raise ValueError(
                    f"prompts file {uri}, row {number}: not UTF-8 text ({error})"
                ) from error
        raise


def _require_columns(
    wanted: list[str], available: list[str], where: str, columns: _Columns
) -> None:
    for name in wanted:
        if name not in available:
            key = "prompt_column" if name == columns.text else "height_column and width_column"
            raise ValueError(
                f"{where} has no column {name!r}; available: {', '.join(available) or 'none'}; "
                f"set embed.{key}"
            )


_READERS: dict[str, Callable[[str, _Columns], Iterator[_Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
