"""Where a checkpoint's tensors lie in its files, as JSON that is checked before anything is read.

torch.distributed.checkpoint keeps this as a pickle, and loading a pickle runs what its writer put
into it. Here it is `metadata.json`:

    {"format": 1, "tensors": {NAME: {"dtype": "float32", "shape": [6, 4], "chunks": [
        {"offset": [0, 0], "shape": [6, 4], "file": "__0_0.distcp", "start": 0, "bytes": 1428}]}}}

Checkpoints of version 0.1.0 have the pickle; `piflow.training.pickled_layout` makes the same tree
of it without loading it. What is read of the files themselves are tensors alone, by `torch.load`
with `weights_only`.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from piflow.storage.files import read_bytes
from piflow.storage.foreign import ForeignDataError, parse_object, shown
from piflow.training.pickled_layout import DTYPE_NAMES, tree_of_pickle

LAYOUT_FILE = "metadata.json"
PICKLED_LAYOUT_FILE = ".metadata"  # version 0.1.0's, which torch.distributed.checkpoint wrote
FORMAT = 1
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}

_MAX_LAYOUT_BYTES = 2**28  # 20B weights with their optimiser on 256 workers stay below
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where its bytes are."""

    offset: tuple[int, ...]  # in the tensor, one index a dimension
    shape: tuple[int, ...]
    file: str  # name in the checkpoint's folder
    start: int  # byte in the file
    bytes: int  # as saved; at least those of the elements


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint says of a tensor; its chunks cover it, and nothing twice."""

    dtype: torch.dtype
    shape: torch.Size
    chunks: tuple[Chunk, ...]  # those that hold elements


Layout = dict[str, StoredTensor]


def read_layout(folder: Path, files: Mapping[str, int]) -> Layout:
    """A checkpoint's tensors by name, every number checked against the others.

    Args:
        files: bytes of the checkpoint's files by name; others are not read.

    Raises:
        ForeignDataError: not as a checkpoint's writer makes it; names file and tensor.
        OSError: the file can't be read.
    """
    if LAYOUT_FILE in files:
        where = str(folder / LAYOUT_FILE)
        content = read_bytes(where, max_bytes=_MAX_LAYOUT_BYTES)
        tree = parse_object(content, where=where, max_bytes=_MAX_LAYOUT_BYTES)
    elif PICKLED_LAYOUT_FILE in files:
        where = str(folder / PICKLED_LAYOUT_FILE)
        tree = tree_of_pickle(read_bytes(where, max_bytes=_MAX_LAYOUT_BYTES), where)
    else:
        raise ForeignDataError(f"{folder} lists no {LAYOUT_FILE} among its files")
    return checked_layout(tree, files, where)


def checked_layout(tree: Mapping[str, Any], files: Mapping[str, int], where: str) -> Layout:
    """The layout of a tree as `metadata.json` holds it.

    Raises:
        ForeignDataError: as `read_layout`.
    """
    version, tensors = tree.get("format"), tree.get("tensors")
    if version != FORMAT:
        raise ForeignDataError(
            f"{where} has format {shown(repr(version))}, this piflow reads {FORMAT}; use the "
            "piflow that wrote it"
        )
    if not isinstance(tensors, dict):
        raise ForeignDataError(f"{where} has no object of tensors")
    layout = {
        name: _tensor(entry, files, f"{where}, tensor {shown(name)},")
        for name, entry in tensors.items()
    }
    _require_apart(layout, where)
    return layout


def _tensor(entry: Any, files: Mapping[str, int], where: str) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "chunks"}:
        raise ForeignDataError(f"{where} is no object of dtype, shape and chunks")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ForeignDataError(
            f"{where} has dtype {shown(repr(entry['dtype']))}; expected one of {', '.join(DTYPES)}"
        )
    shape = _numbers(entry["shape"], "shape", where)
    if not isinstance(entry["chunks"], list):
        raise ForeignDataError(f"{where} has no list of chunks")
    found = [_chunk(chunk, shape, dtype, files, where) for chunk in entry["chunks"]]
    chunks = tuple(chunk for chunk in found if math.prod(chunk.shape))
    if not _covers(chunks, shape):
        raise ForeignDataError(
            f"{where} has {len(chunks)} chunks that don't cover its shape {list(shape)} once"
        )
    return StoredTensor(dtype, torch.Size(shape), chunks)


def _chunk(
    entry: Any, shape: Sequence[int], dtype: torch.dtype, files: Mapping[str, int], where: str
) -> Chunk:
    keys = {"offset", "shape", "file", "start", "bytes"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ForeignDataError(f"{where} has a chunk that is no object of {sorted(keys)}")
    offset, size = (_numbers(entry[key], f"chunk's {key}", where) for key in ("offset", "shape"))
    start, length = _numbers([entry["start"], entry["bytes"]], "chunk's place", where)
    file = entry["file"]
    if not isinstance(file, str) or file not in files:
        raise ForeignDataError(
            f"{where} lies in {shown(repr(file))}, which is none of the checkpoint's files"
        )
    if not len(offset) == len(size) == len(shape) or any(
        first + count > whole for first, count, whole in zip(offset, size, shape, strict=True)
    ):
        raise ForeignDataError(
            f"{where} has a chunk of {list(size)} at {list(offset)}, outside its shape "
            f"{list(shape)}"
        )
    needed = math.prod(size) * dtype.itemsize
    if start + length > files[file] or length < needed:
        raise ForeignDataError(
            f"{where} has a chunk of {needed} bytes in bytes {start} to {start + length} of "
            f"{file}, which has {files[file]}"
        )
    return Chunk(offset, size, file, start, length)


def _numbers(value: Any, what: str, where: str) -> tuple[int, ...]:
    """A short list of integers from 0 on."""
    good = (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(number) is int and 0 <= number < 2**63 for number in value)
    )
    if not good:
        raise ForeignDataError(
            f"{where} has {what} {shown(repr(value))}; expected at most {_MAX_DIMENSIONS} integers "
            "from 0 to 2^63 - 1"
        )
    return tuple(value)


def _covers(chunks: Sequence[Chunk], shape: Sequence[int]) -> bool:
    """Whether the chunks are the cells of a grid over the shape, each once: so shards are."""
    if not math.prod(shape):
        return not chunks
    cells = 1
    for dimension, length in enumerate(shape):
        end = 0
        parts = sorted({(chunk.offset[dimension], chunk.shape[dimension]) for chunk in chunks})
        for first, count in parts:
            if first != end:
                return False
            end += count
        if end != length:
            return False
        cells *= len(parts)
    return cells == len(chunks) == len({chunk.offset for chunk in chunks})


def _require_apart(layout: Layout, where: str) -> None:
    """No byte of a file belongs to two chunks, so the files' sizes bound all tensors together."""
    places = sorted(
        (chunk.file, chunk.start, chunk.bytes, name)
        for name, tensor in layout.items()
        for chunk in tensor.chunks
    )
    for (file, start, length, name), (next_file, next_start, _, other) in zip(
        places, places[1:], strict=False
    ):
        if file == next_file and start + length > next_start:
            raise ForeignDataError(
                f"{where} has {shown(name)} and {shown(other)} at the same bytes of {file}"
            )


class LayoutWriter(FileSystemWriter):
    """torch.distributed.checkpoint's writer, with the layout as JSON in place of a pickle."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `metadata.json`; rank 0 calls it with what all ranks wrote."""
        places = {result.index: result.storage_data for part in results for result in part}
        tree = {
            "format": FORMAT,
            "tensors": {
                name: _entry(name, stored, places)
                for name, stored in metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            },
        }
        content = json.dumps(tree, separators=(",", ":")).encode()
        with (Path(self.path) / LAYOUT_FILE).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


def _entry(
    name: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo]
) -> dict[str, Any]:
    chunks = []
    for chunk in stored.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        chunks.append(
            {
                "offset": list(chunk.offsets),
                "shape": list(chunk.sizes),
                "file": place.relative_path,
                "start": place.offset,
                "bytes": place.length,
            }
        )
    dtype = str(stored.properties.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(stored.size), "chunks": chunks}


class LayoutReader(FileSystemReader):
    """torch.distributed.checkpoint's reader of a layout that was checked; it reads no pickle.

    Args:
        folder: the checkpoint's folder.
        layout: its tensors, from `read_layout`.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(str(folder))
        self._layout = layout

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The layout as torch.distributed.checkpoint has it; no file is read."""
        tensors: dict[str, Any] = {}
        places = {}
        for name, stored in self._layout.items():
            chunks = []
            for chunk in stored.chunks:
                offset = torch.Size(chunk.offset)
                chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk.shape)))
                place = _StorageInfo(chunk.file, chunk.start, chunk.bytes)
                places[MetadataIndex(name, offset)] = place
            properties = TensorProperties(dtype=stored.dtype)
            tensors[name] = TensorStorageMetadata(properties, stored.shape, chunks)
        return Metadata(tensors, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors.

        Raises:
            ForeignDataError: a chunk is no archive of `torch.save`, or would unpack to more bytes
                than it has.
        """
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            where = f"{place.relative_path} at byte {place.offset}"
            if item.type is not LoadItemType.TENSOR:  # torch would load a pickle
                raise ForeignDataError(f"{where} holds {item.type}, expected a tensor")
            with (Path(self.path) / place.relative_path).open("rb") as stream:
                _require_plain(_Part(stream, place.offset, place.length), where)
        return super().read_data(plan, planner)


class _Part(io.RawIOBase):
    """A range of a file's bytes as a file of its own, to read."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._stream, self._start, self.length = stream, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}
        at = origins[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, "a seek before the begin")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._stream.seek(self._start + self._at)
        content = self._stream.read(max(0, min(len(buffer), self.length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _require_plain(part: _Part, where: str) -> None:
    """That a part of a file is an archive whose members are stored as they are."""
    try:
        with ZipFile(part) as archive:
            entries = archive.infolist()
    except (BadZipFile, ValueError, OSError, struct.error) as error:
        raise ForeignDataError(f"{where} is no archive of torch: {shown(error)}") from None
    if (
        any(entry.compress_type != ZIP_STORED for entry in entries)
        or sum(entry.file_size for entry in entries) > part.length
    ):
        raise ForeignDataError(f"{where} would unpack to more bytes than it has")
