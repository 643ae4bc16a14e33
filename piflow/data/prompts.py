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

import errno
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from pyarrow import fs

from piflow import storage
from piflow.data.prompt_rows import MAX_PROMPT_BYTES, Columns, Row, read_rows
from piflow.storage.foreign import shown
from piflow.storage.places import NamedPlaces

COLUMN_FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
FORMATS = (".txt", ".txt.gz", *COLUMN_FORMATS)
DATASET_FOLDERS = ("", "data", "train", "data/train")
"""Where the files of a dataset folder may lie."""

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # words that name a split, as in the Hugging Face datasets library
_PART = re.compile(r"(.*)-(\d+)-of-(\d+)(\D.*|)", re.DOTALL)
_MOST_PARTS = 1_000_000
_UNSEEN_CATEGORIES = ("Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs")
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that are drawn as nothing
_MEAN_CHARACTERS = 1024  # of a prompt and its picture's name: more don't fit into memory


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
    folders: tuple[str, ...] = field(default=(), compare=False)  # a local file must lie in one


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, the size in pixels of the pictures that it stands for, and one such picture.

    Where a picture is to be edited it is the ``condition``; ``condition_size`` is the (height,
    width) that it is scaled to, once it was looked at.
    """

    text: str
    height: int
    width: int
    picture: PictureSource | None = None
    condition: PictureSource | None = None
    condition_size: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def num_characters(self) -> int:
        """Of the text and the pictures' names."""
        sources = (self.picture, self.condition)
        return len(self.text) + sum(len(source.key) for source in sources if source is not None)

    @property
    def prompt_id(self) -> str:
        """16 hex digits of the sha256 of size, pictures' keys and text: the same in every store."""
        size = f"{self.height}x{self.width}"
        if self.picture is not None:
            size += f" {hashlib.sha256(self.picture.key.encode()).hexdigest()}"
        if self.condition is not None:
            size += f" edits {hashlib.sha256(self.condition.key.encode()).hexdigest()}"
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


def read_prompts(
    uri: str,
    *,
    column: str = "prompt",
    height: int,
    width: int,
    height_column: str | None = None,
    width_column: str | None = None,
    image_column: str | None = None,
    condition_column: str | None = None,
    allow_uris: Sequence[str] = (),
    max_prompts: int = 10_000_000,
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
        condition_column: the same of pictures that are to be edited.
        allow_uris: places that pictures may be named in besides their prompts file's folder or, on
            S3, its bucket (`storage.places`).
        max_prompts: rows of all files together, repeated ones counted; the distinct texts and
            names of pictures may take 1 KiB each on average.
        buckets: (height, width) pairs in pixels; empty: all prompts get ``height`` x ``width``.
        seed: of the choice among buckets.

    Raises:
        FileNotFoundError: there is no such file or folder, or nothing matches the pattern.
        ValueError: unknown format, missing column, unreadable content, a blank or too long prompt,
            a text or size of a wrong type, a picture in a place that rows may not name (these name
            file and line or row), too many prompts, or no prompt at all.
    """
    if (height_column is None) != (width_column is None):
        raise ValueError(
            f"height_column is {height_column!r}, width_column is {width_column!r}; give both or "
            "neither"
        )
    columns = Columns(column, height_column, width_column, image_column, condition_column)

    def default_size(text: str) -> tuple[int, int]:
        return choose_bucket(text, buckets, seed) if buckets else (height, width)

    distinct: dict[Prompt, None] = {}
    count = size = 0
    files = prompt_files(uri)
    root = os.path.commonpath([_folder(file) for file in files]) if len(files) > 1 else None
    for file in files:
        inside = "" if root is None else os.path.relpath(_folder(file), root).removeprefix(".")
        places = NamedPlaces(file, allow_uris)
        for prompt in _read_file(file, inside, columns, places, default_size):
            count += 1
            if prompt not in distinct:
                distinct[prompt] = None
                size += prompt.num_characters
            if count > max_prompts or size > _MEAN_CHARACTERS * max_prompts:
                raise ValueError(
                    f"prompts file {file}: more than {max_prompts} rows, or than "
                    f"{_MEAN_CHARACTERS * max_prompts} characters of distinct prompts, up to here; "
                    "if that is meant, raise embed.max_prompts"
                )
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
            splits but no train split, or with several formats; or a set of numbered parts
            (``-00000-of-00003``) that lacks one which the folder or pattern stands for.
    """
    files = storage.expand(uri)
    if files == [uri]:
        system, path = storage.filesystem(uri)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", uri)
        if kind == fs.FileType.Directory:
            files = _dataset_files(uri)
            _require_all_parts(files, "*")
            return files
        if kind != fs.FileType.File:  # reading a pipe would wait for a writer
            raise ValueError(f"prompts file {uri} is no regular file; expected a file or a folder")
    else:
        _require_all_parts(files, storage.base_name(uri))
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


def _require_all_parts(files: Sequence[str], pattern: str) -> None:
    """Check that no part of a numbered set is missing that a pattern of names would match.

    Raises:
        ValueError: names the first.
    """
    sets: dict[tuple[str, str, str], dict[int, str]] = {}
    for file in files:
        if match := _PART.fullmatch(file):
            before, number, total, after = match.groups()
            sets.setdefault((before, total, after), {})[int(number)] = number
    for (before, total, after), found in sets.items():
        width = len(next(iter(found.values())))
        absent = (n for n in range(min(int(total), _MOST_PARTS)) if n not in found)
        names = (f"{before}-{number:0{width}}-of-{total}{after}" for number in absent)
        missing = next((n for n in names if fnmatchcase(storage.base_name(n), pattern)), None)
        if missing is not None:
            raise ValueError(
                f"prompts file {missing} is missing: there are {len(found)} of its set of "
                f"{int(total)} files; fetch it, or name the files to read by a pattern that "
                "doesn't match it"
            )


def _split(name: str) -> str | None:
    """The split that a relative path names by its first word that is a split's, or None."""
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in _SPLITS.items():
            if word in words:
                return split
    return None


# ---------------------------------------------------------------------------------------- prompts


def _folder(uri: str) -> str:
    """A file's folder, without the query of an object's URI; for comparison only."""
    return os.path.dirname(uri.partition("?")[0] if storage.on_objects(uri) else uri)


def _read_file(
    uri: str,
    inside: str,
    columns: Columns,
    places: NamedPlaces,
    default_size: Callable[[str], tuple[int, int]],
) -> Iterator[Prompt]:
    """Prompts of one file, which lies `inside` (a relative path) the folder of all files."""
    unit = "row" if storage.suffix(uri) == ".parquet" else "line"
    for row in read_rows(uri, columns):
        try:
            picture, condition = (
                None if name is None else _to_picture(value, row.number, uri, inside, places)
                for name, value in (
                    (columns.picture, row.picture),
                    (columns.condition, row.condition),
                )
            )
            prompt = _to_prompt(row, picture, condition, default_size)
        except ValueError as error:
            raise ValueError(f"prompts file {uri}, {unit} {row.number}: {error}") from error
        yield prompt


def _to_picture(
    value: Any, number: int, uri: str, inside: str, places: NamedPlaces
) -> PictureSource:
    if isinstance(value, dict):  # as the datasets library writes it
        if not value.keys() & {"bytes", "path"}:
            names = shown(", ".join(map(str, value)))
            raise ValueError(f"the picture must have bytes or a path, got {names}")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        return PictureSource("", "")
    if isinstance(value, bytes):
        return PictureSource(f"sha256:{hashlib.sha256(value).hexdigest()}", uri, number - 1)
    if not isinstance(value, str):
        raise ValueError(f"the picture must be a path, a URI or bytes, got {shown(repr(value))}")
    try:
        place = places.resolve(value)
    except ValueError as error:
        raise ValueError(f"the picture {error}") from error
    named_as_it_is = "://" in value or os.path.isabs(value)
    key = value if named_as_it_is else os.path.join(inside, value)
    is_local = storage.scheme(place) in ("file", "package")
    return PictureSource(key, place, folders=places.folders if is_local else ())


def _to_prompt(
    row: Row,
    picture: PictureSource | None,
    condition: PictureSource | None,
    default_size: Callable[[str], tuple[int, int]],
) -> Prompt:
    text, height, width = row.text, row.height, row.width
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"the prompt must be a text, got {shown(repr(text))}")
    text = text.strip()
    require_text(text)
    own = _to_pixels(height, "height"), _to_pixels(width, "width")
    if own == (None, None):
        return Prompt(text, *default_size(text), picture, condition)
    if own[0] is None or own[1] is None:
        raise ValueError(
            f"height is {shown(repr(height))} and width {shown(repr(width))}; give both, or leave "
            "both empty"
        )
    return Prompt(text, own[0], own[1], picture, condition)


def require_text(text: str) -> None:
    r"""Check what no prompt can be.

    Raises:
        ValueError: nothing that can be seen, more than `MAX_PROMPT_BYTES`, NUL characters, or half
            a surrogate pair, which JSON can spell ("\ud83d") and no UTF-8 text holds.
    """
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt {shown(repr(text))} is not valid Unicode ({error})"
        ) from error
    if size > MAX_PROMPT_BYTES:
        raise ValueError(
            f"the prompt has {size} bytes, at most {MAX_PROMPT_BYTES} are taken; it begins "
            f"{shown(repr(text[:60]))}; check that each prompt stands on its own line"
        )
    if "\0" in text:
        raise ValueError(
            f"the prompt {shown(repr(text))} holds NUL characters, as UTF-16 read as UTF-8 does; "
            "write it anew in UTF-8"
        )
    if not any(map(_can_be_seen, text)):
        what = f"holds nothing that can be seen, {shown(repr(text))}" if text else "is blank"
        raise ValueError(f"the prompt {what}; remove it or write a text")


def _can_be_seen(character: str) -> bool:
    if character.isalnum():
        return character not in _FILLERS
    # unknown characters (Cn) count: they are newer than this Python's tables
    return unicodedata.category(character) not in _UNSEEN_CATEGORIES and character not in _FILLERS


def _to_pixels(value: Any, name: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and len(value) < 20 and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(
            f"{name} must be a positive whole number of pixels, got {shown(repr(value))}"
        )
    return value
