"""The header of a safetensors file on any storage, every number of it checked.

safetensors' own reader checks as much, of local files and of bytes in memory; this one reads the
header alone, by its range of bytes, from an object store as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from piflow.storage.files import explained, filesystem
from piflow.storage.foreign import ForeignDataError, parse_object, shown

MAX_HEADER_BYTES = 16 * 2**20
"""The headers of 20B weights have some 100 KB."""

MAX_FILE_BYTES = 128 * 2**30
"""Of a file that is read whole; a fully trained student of 32B weights in bfloat16 has half of it.
"""

MAX_DIMENSIONS = 16

_LENGTH_BYTES = 8  # of the header's length, at the file's start

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorRange:
    """Where a tensor's values lie.

    Attributes:
        code: of its dtype, a key of `ITEM_BYTES`.
        shape: as stored.
        start, end: its bytes in the file.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        metadata: the exporter's texts.
        tensors: by name.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorRange]


def read_header(uri: str) -> Header:
    """The header of a safetensors file; no values are read.

    Raises:
        ForeignDataError: it isn't safetensors, is cut short, or its numbers don't fit one another
            or the file: a header over the limit, unknown dtypes, negative, overlapping or missing
            ranges, or ranges that aren't as long as shape and dtype ask for.
        OSError: it can't be read.
    """
    with explained(uri):
        system, path = filesystem(uri)
        with system.open_input_file(path) as file:
            size = file.size()
            prefix = bytes(file.read(_LENGTH_BYTES))
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or _LENGTH_BYTES + length > size:
                raise ForeignDataError(f"{uri} is cut short or isn't safetensors: copy it again")
            if length > MAX_HEADER_BYTES:
                raise ForeignDataError(
                    f"{uri} claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are "
                    "read: it isn't safetensors, or no model's weights"
                )
            content = bytes(file.read(length))
    tree = parse_object(content, where=f"{uri} isn't safetensors: its header")
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ForeignDataError(f"{uri} isn't safetensors: its __metadata__ holds more than texts")
    begin = _LENGTH_BYTES + length
    tensors = {name: _range(uri, name, entry, begin) for name, entry in tree.items()}
    _check_whole(uri, tensors, begin, size)
    return Header(metadata, tensors)


def _range(uri: str, name: str, entry: Any, begin: int) -> TensorRange:
    """One entry of a header; `begin` is where the values start."""
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [start, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, start, end)
        ):
            pass
        case _:
            raise ForeignDataError(
                f"{uri} isn't safetensors: its header says {shown(entry)} of {shown(name)}"
            )
    if code not in ITEM_BYTES:
        raise ForeignDataError(
            f"{uri}: {shown(name)} is {shown(code)}, expected one of {', '.join(ITEM_BYTES)}: give "
            "weights that aren't quantised"
        )
    if len(shape) > MAX_DIMENSIONS or end - start != math.prod(shape) * ITEM_BYTES[code]:
        raise ForeignDataError(
            f"{uri} is damaged at {shown(name)}: bytes {start} to {end} don't hold {code} of shape "
            f"{shown(shape)}: copy it again"
        )
    return TensorRange(code, tuple(shape), begin + start, begin + end)


def _check_whole(uri: str, tensors: dict[str, TensorRange], begin: int, size: int) -> None:
    """Each byte behind the header belongs to exactly one tensor, as the format asks."""
    position, last = begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise ForeignDataError(
                f"{uri} is damaged: {shown(name)} starts at byte {tensor.start}, {shown(last)} "
                f"ends at byte {position}: copy it again"
            )
        position, last = tensor.end, name
    if position != size:
        raise ForeignDataError(
            f"{uri} is cut short or damaged: its tensors end at byte {position}, the file at byte "
            f"{size}: copy it again"
        )
