"""Read prompts: text, CSV, JSON lines or Parquet; one file, a pattern or a dataset folder.

::

    embed.prompts ──▶ prompt_files: files, in order ──▶ rows: number, text, height, width, picture
                                                             │ checked, sized
                                                 distinct prompts in order of appearance

Files are streamed through `piflow.storage.files`, line by line or in Parquet batches of the wanted
columns only: what stays in memory is the distinct prompts. Pictures are named here, not opened;
those that lie in a Parquet file as bytes are read once, for their hash.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

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
_BATCH_ROWS_WITH_PICTURES = 64  # which may hold megabytes each


class _Row(NamedTuple):
    number: int  # in the file, from 1
    text: Any  # this and the others as they came
    height: Any
    width: Any
    picture: Any


@dataclass(frozen=True, slots=True)
class PictureSource:
    """A prompt's picture: what tells it from others, and where it lies.

    ``key`` is the path or URI that the prompts file names, relative to the folder that all prompts
    files lie in, or ``sha256:`` and the hash of the bytes that a Parquet file holds. A picture that
    is replaced under its old name keeps its key.
    """

    key: str  # "" : the row names no picture
    uri: str = field(compare=False)  # of the picture's file, or of the Parquet file
    row: int | None = field(default=None, compare=False)  # in the Parquet file, from 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, the size in pixels of the pictures that it stands for, and one such picture."""

    text: str
    height: int
    width: int
    picture: PictureSource | None = None

    @property
    def prompt_id(self) -> str:
        """16 hex digits of the sha256 of size, picture's key and text: the same in every store."""
        size = f"{self.height}x{self.width}"
        if self.picture is not None:
            size += f" {hashlib.sha256(self.picture.key.encode()).hexdigest()}"
        return hashlib.sha256(f"{size}\n{self.text}".encode()).hexdigest()[:16]


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
    picture: str | None

    @property
    def places(self) -> tuple[str | None, ...]:
        """In the order of a `_Row`."""
        return (self.text, self.height, self.width, self.picture)

    @property
    def optional(self) -> list[str]:
        return [name for name in self.places[1:] if name is not None]

    @property
    def names(self) -> list[str]:
        return [self.text, *self.optional]

    def key_of(self, name: str) -> str:
        """The recipe's key that named a column."""
        keys = ("prompt_column", "height_column", "width_column", "image_column")
        return f"embed.{keys[self.places.index(name)]}"


def read_prompts(
    uri: str,
    *,
    column: str = "prompt",
    height: int,
    width: int,
    height_column: str | None = None,
    width_column: str | None = None,
    image_column: str | None = None,
    buckets: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> PromptSet:
    """Read the prompts of one or many files.

    ``.txt`` files hold one prompt a line, the other formats have columns. Blanks around a text are
    stripped; the same text at the same size with the same picture counts once. A prompt's picture
    size is, in this order, its own (``height_column`` and ``width_column``, where they aren't
    empty), a bucket by `choose_bucket`, or ``height`` x ``width``.

    Args:
        uri: a file, local or on S3, in UTF-8; a pattern, whose files are read in order of their
            names; or a dataset folder (`prompt_files`). Formats: `FORMATS`.
        column: name of the text's column; ignored for ``.txt``.
        height: pixels.
        width: pixels.
        height_column: name of the column of heights in pixels; None: prompts bring no size.
        width_column: the same for widths; both or neither.
        image_column: name of the column of pictures; None: prompts bring none. A value is a path,
            relative to its prompts file's folder or absolute, or a URI; in Parquet also the bytes
            of an image file, or a struct of ``bytes`` and ``path`` as the datasets library writes.
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
    columns = _Columns(column, height_column, width_column, image_column)

    def default_size(text: str) -> tuple[int, int]:
        return choose_bucket(text, buckets, seed) if buckets else (height, width)

    distinct: dict[Prompt, None] = {}
    count = 0
    files = prompt_files(uri)
    root = os.path.commonpath([_folder(file) for file in files]) if len(files) > 1 else None
    for file in files:
        inside = "" if root is None else os.path.relpath(_folder(file), root).removeprefix(".")
        for prompt in _read_file(file, inside, columns, default_size):
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


def _folder(uri: str) -> str:
    """A file's folder, without an S3 URI's query; for comparison only."""
    return os.path.dirname(uri.partition("?")[0] if storage.scheme(uri) == "s3" else uri)


def _read_file(
    uri: str, inside: str, columns: _Columns, default_size: Callable[[str], tuple[int, int]]
) -> Iterator[Prompt]:
    """Prompts of one file, which lies `inside` (a relative path) the folder of all files."""
    ending = storage.suffix(uri).removesuffix(".gz")
    unit = "row" if ending == ".parquet" else "line"
    for row in _READERS[ending](uri, columns):
        try:
            picture = None if columns.picture is None else _to_picture(row, uri, inside)
            prompt = _to_prompt(row, picture, default_size)
        except ValueError as error:
            raise ValueError(f"prompts file {uri}, {unit} {row.number}: {error}") from error
        yield prompt


def _to_picture(row: _Row, uri: str, inside: str) -> PictureSource:
    value = row.picture
    if isinstance(value, dict):  # as the datasets library writes it
        if not value.keys() & {"bytes", "path"}:
            raise ValueError(f"the picture must have bytes or a path, got {', '.join(value)}")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        return PictureSource("", "")
    if isinstance(value, bytes):
        return PictureSource(f"sha256:{hashlib.sha256(value).hexdigest()}", uri, row.number - 1)
    if not isinstance(value, str):
        raise ValueError(f"the picture must be a path, a URI or bytes, got {value!r}")
    if "://" in value or os.path.isabs(value):
        storage.require_valid(value)
        return PictureSource(value, value)
    name = quote(value) if storage.scheme(uri) == "s3" else value
    place = storage.absolute(storage.sibling(uri, name))
    return PictureSource(os.path.join(inside, value), place)


def _to_prompt(
    row: _Row, picture: PictureSource | None, default_size: Callable[[str], tuple[int, int]]
) -> Prompt:
    text, height, width = row.text, row.height, row.width
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
        return Prompt(text, *default_size(text), picture)
    if own[0] is None or own[1] is None:
        raise ValueError(
            f"height is {height!r} and width {width!r}; give both, or leave both empty"
        )
    return Prompt(text, own[0], own[1], picture)


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
    for name in columns.optional:
        raise ValueError(
            f"prompts file {uri} has no columns, but {columns.key_of(name)} is {name!r}; leave it "
            "empty, or give a file with columns"
        )
    for number, line in enumerate(_lines(uri), 1):
        yield _Row(number, line, None, None, None)


def _json_rows(uri: str, columns: _Columns) -> Iterator[_Row]:
    absent = set(columns.optional)  # a line may lack them, but if all lines do it is a mistake
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
        yield _Row(number, *(entry.get(name) for name in columns.places))
    if number and absent:
        raise ValueError(
            f"prompts file {uri}: no line has {' or '.join(sorted(absent))}; check "
            f"{' and '.join(columns.key_of(name) for name in sorted(absent))}"
        )


def _csv_rows(uri: str, columns: _Columns) -> Iterator[_Row]:
    reader = csv.reader(_lines(uri), strict=True)
    try:
        header = next(reader, [])
        _require_columns(columns.names, header, f"prompts file {uri}", columns)
        wanted = [  # the place beyond the last column holds ""
            len(header) if name is None else header.index(name) for name in columns.places
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
                yield _Row(start, *(row[place] for place in wanted))
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
            size = _BATCH_ROWS if columns.picture is None else _BATCH_ROWS_WITH_PICTURES
            for batch in file.iter_batches(size, columns=columns.names):
                texts = _to_texts(batch.column(columns.text), uri, start)
                others = (
                    [None] * len(batch) if name is None else batch.column(name).to_pylist()
                    for name in columns.places[1:]
                )
                numbers = range(start, start + len(batch))
                yield from map(_Row._make, zip(numbers, texts, *others, strict=True))
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
            raise ValueError(
                f"{where} has no column {name!r}; available: {', '.join(available) or 'none'}; "
                f"set {columns.key_of(name)}"
            )


_READERS: dict[str, Callable[[str, _Columns], Iterator[_Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
