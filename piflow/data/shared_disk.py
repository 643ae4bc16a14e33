"""Whether all machines see the same folder, before hours of work go to a disk of one of them.

A driver that owns a folder has its name in a file there. A worker that doesn't find it looks at
another disk: its own, under the same path. Every worker compares, before it writes anything.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from piflow import storage
from piflow.data.manifest import StoreError, read_manifest
from piflow.data.reader import EmbeddingStore, PromptStore
from piflow.runs.lease import OWNER_FILE, Ownership, RunTakenError, owned, require_owner

WRITER_FILE = "writer.json"  # of a store, says which `piflow embed` writes it


class SharedDiskError(ValueError):
    """Machines of one job have different folders under the same path."""


@contextmanager
def one_writer(store: str) -> Iterator[Ownership]:
    """Be the only `piflow embed` that writes a store while the block runs.

    Raises:
        StoreError: another one writes it, or has taken it over meanwhile.
        OSError: the store's folder can't be written.
    """
    try:
        with owned(store, WRITER_FILE) as ownership:
            yield ownership
    except RunTakenError as error:
        raise StoreError(
            f"embedding store {store} is being written by {error.owner or 'another job'}; one "
            "`piflow embed` at a time writes a store. Run this one again when that one has ended, "
            "or choose another embed.store"
        ) from error


def require_shared(folder: str, process: str, file: str = OWNER_FILE) -> None:
    """Check on a worker's machine that the driver's folder is there, and the driver's still.

    Args:
        folder: the run's, or with `WRITER_FILE` the store's.
        process: what the driver calls itself, its `lease.PROCESS`.
        file: says whose the folder is.

    Raises:
        SharedDiskError: the driver's name isn't in this machine's folder.
        RunTakenError: another driver has taken the folder over.
    """
    try:
        require_owner(folder, process, file)
    except RunTakenError as error:
        if error.owner is not None or storage.on_objects(folder):
            raise
        raise SharedDiskError(_not_shared(folder, f"the driver's {file} isn't in it")) from error


def require_visible(uri: str) -> None:
    """Check on a worker's machine that files which the driver found are there.

    Args:
        uri: of a file, or a pattern that matches some.

    Raises:
        SharedDiskError: none is.
    """
    if not any(map(storage.exists, _expanded(uri))):
        raise SharedDiskError(_not_shared(uri, "no such file"))


def _expanded(uri: str) -> list[str]:
    try:
        return storage.expand(uri)
    except FileNotFoundError:
        return []


def require_same_store(store: PromptStore) -> None:
    """Check on a worker's machine that the store that the driver opened is there, and the same.

    In online mode there are no files that a worker reads.

    Raises:
        StoreError: it isn't there, or it is another one by now.
    """
    if not isinstance(store, EmbeddingStore):
        return
    try:
        found = read_manifest(store.uri).manifest_hash
    except StoreError as error:
        raise StoreError(_not_shared(store.uri, str(error))) from error
    if found != store.manifest_hash:
        raise StoreError(
            f"embedding store {store.uri} is {found[:16]} on {socket.gethostname()}, "
            f"the driver opened {store.manifest_hash[:16]}: it was replaced meanwhile, or every "
            "machine has its own. Restore it, or start a new run"
        )


def _not_shared(folder: str, reason: str) -> str:
    return (
        f"{socket.gethostname()} doesn't see {folder} as the driver does ({reason}): put it on a "
        "disk that all machines mount under this path, or on s3://…"
    )
