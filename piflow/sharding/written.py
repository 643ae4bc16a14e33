"""Safetensors files from tensors that are read one by one, and a model's weights in shards of them.

It is what the library writes, which would hold all values of a file three times; but the library
orders the metadata in another way in every process. The same values give the same bytes here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piflow import storage
from piflow.sharding.weights import DTYPES, WEIGHTS_FILE

MAX_SHARD_BYTES = 2 * 2**30
"""Of a model's weights in one file, which is held in memory; a larger tensor has one of its own."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what its header says of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Read = Callable[[str], Tensor]
"""Name -> a whole tensor of the entry's shape, of any dtype."""


def serialised(entries: Mapping[str, Entry], metadata: Mapping[str, str], read: Read) -> bytearray:
    """A safetensors file, filled tensor by tensor.

    Raises:
        ValueError: values that the entry's dtype can't hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    # the library's own order, by which each tensor is aligned to its numbers' size
    ordered = sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, entry in ordered:
        start, end = end, end + entry.bytes
        place = {"shape": list(entry.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": _CODES[entry.dtype], **place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned to 8 bytes
    content = bytearray(8 + len(text) + end)
    content[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    values = torch.frombuffer(content, dtype=torch.uint8)[8 + len(text) :]
    for name, entry in ordered:
        start, end = header[name]["data_offsets"]
        out = values[start:end].view(entry.dtype)
        out.copy_(read(name).detach().flatten())
        if entry.dtype.itemsize > 1 and not out.isfinite().all():
            kind = str(entry.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} has values that {kind} can't hold: export as bfloat16 or float32, or "
                "check that training stayed finite"
            )
    return content


def write_weights(
    folder: str,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    read: Read,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Writes a model's weights as diffusers lays them out: one file, or shards and their index.

    Memory holds a shard and what `read` gives. The index comes last.

    Args:
        folder: URI.
        entries: at least one.
        metadata: of every file.

    Returns:
        File -> hex sha256 of its bytes.

    Raises:
        ValueError: as `serialised`.
    """
    shards = _shards(entries, max_shard_bytes)
    stem, _, ending = WEIGHTS_FILE.rpartition(".")
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE
        if len(shards) > 1:
            file = f"{stem}-{number:05}-of-{len(shards):05}.{ending}"
        content = serialised({name: entries[name] for name in names}, metadata, read)
        storage.write_bytes(storage.join(folder, file), memoryview(content))
        hashes[file] = hashlib.sha256(content).hexdigest()
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(entry.bytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2).encode() + b"\n"
        storage.write_bytes(storage.join(folder, f"{WEIGHTS_FILE}.index.json"), text)
    return hashes


def _shards(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Names by shard, in their order; none is larger than the limit but for a single tensor."""
    shards: list[list[str]] = []
    filled = limit
    for name, entry in sorted(entries.items()):
        if filled + entry.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.bytes
    return shards
