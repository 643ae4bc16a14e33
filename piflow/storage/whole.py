"""Hashes of whole weights files, which are read once a machine and only if somebody asks.

Whenever weights are opened, `weights_fingerprint` is compared, which reads 3 KiB of each tensor and
finds that they were trained on or exchanged. A few values that somebody changed on purpose are
found by reading every byte alone: 24 GB take half a minute from a fast disk and many from an object
store, again on each machine, so no start waits for that. `piflow check --whole-base` does it. What
it found is kept by what the file system says of a file, and takes part in every later start.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from piflow.storage.files import (
    default_cache,
    file_stamps,
    local_folder,
    read_bytes,
    sha256,
    write_bytes,
)
from piflow.storage.foreign import ForeignDataError, parse_object
from piflow.storage.hub import hub_hashes
from piflow.storage.uri import absolute, join, member, scheme

_READERS = 4  # files that are hashed side by side


def known_hashes(folder: str) -> dict[str, str] | None:
    """What `whole_hashes` found of these very files on this machine; None: it wasn't asked yet.

    Reads nothing of the files. A place on the hub is known by its commit instead.

    Raises:
        OSError: the storage refused or didn't answer.
    """
    if scheme(folder) == "hf":
        return None
    stamps = _weights(folder)
    found = {name: _read_note(folder, name, stamp) for name, stamp in stamps.items()}
    hashes = {name: content for name, content in found.items() if content is not None}
    return hashes if hashes and len(hashes) == len(stamps) else None


def whole_hashes(folder: str) -> dict[str, str]:
    """Name -> hex sha256 of all bytes of each safetensors file right in a folder, by reading them.

    Files of a hub are compared with the hashes that the hub has of them.

    Args:
        folder: URI.

    Raises:
        ForeignDataError: a file from a hub isn't what the hub says.
        OSError: the storage refused or didn't answer.
    """
    place = str(local_folder(folder)) if scheme(folder) == "hf" else folder
    stamps = _weights(place)
    with ThreadPoolExecutor(_READERS) as readers:
        hashes = dict(
            zip(stamps, readers.map(lambda name: sha256(member(place, name)), stamps), strict=True)
        )
    if scheme(folder) == "hf":
        _require_same(hashes, hub_hashes(folder), folder)
        return hashes
    for name, stamp in stamps.items():
        note = json.dumps({"stamp": stamp, "sha256": hashes[name]})
        write_bytes(str(_note(place, name)), note.encode())
    return hashes


def _require_same(found: dict[str, str], expected: dict[str, str], uri: str) -> None:
    for name, content in found.items():
        if name in expected and content != expected[name]:
            raise ForeignDataError(
                f"{join(uri, name)} has sha256 {content[:16]} in this machine's cache, on the hub "
                f"{expected[name][:16]}: delete it from the cache (`hf cache`), and it is fetched "
                "again"
            )


def _weights(folder: str) -> dict[str, str]:
    """Name -> stamp of the safetensors files right in a folder."""
    stamps = file_stamps(folder)
    return {name: stamp for name, stamp in stamps.items() if name.endswith(".safetensors")}


def _note(folder: str, name: str) -> Path:
    key = hashlib.sha256(f"{absolute(folder)}\0{name}".encode()).hexdigest()
    return default_cache() / "sha256" / f"{key[:32]}.json"


def _read_note(folder: str, name: str, stamp: str) -> str | None:
    place = str(_note(folder, name))
    try:
        note = parse_object(read_bytes(place, max_bytes=4096), where=place)
    except (OSError, ForeignDataError):
        return None
    content = note.get("sha256")
    return content if note.get("stamp") == stamp and isinstance(content, str) else None
