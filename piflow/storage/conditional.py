"""Objects that are written only if nobody else did, which pyarrow's file systems can't do.

Each store has its own way, by its own client: S3's `If-Match` (boto3), Google's generations
(google-cloud-storage), Azure's `If-Match` (azure-storage-blob). All requests have time limits and
are tried again while a store is away or throttles.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from piflow.storage.uri import scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 2**20
"""Of an object that is written on a condition: it says whose a folder is."""

_MODULES: Mapping[str, str] = {"s3": "s3_conditional", "gs": "gcs", "abfs": "azure"}


def read(uri: str) -> tuple[bytes, str] | None:
    """Content and version of an object; None: there is none.

    Of one that has more than `MAX_BYTES`, and so is none of piflow's, only the beginning.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
        ModuleNotFoundError: the store's client isn't installed; says which extra has it.
    """
    found: tuple[bytes, str] | None = _store(uri).read(uri, MAX_BYTES)
    return found


def write_if(uri: str, content: bytes, version: str | None) -> str | None:
    """Write an object only if nobody else did since it had `version` (None: since it was absent).

    Of several processes that try, one succeeds. Not all stores make check and write one step
    (SeaweedFS 4.48 may let two of the same moment pass), so it pays to look again. If an answer is
    lost, the write is tried again and finds its own content: who gets None and must know reads it.

    Returns:
        The new version; None: somebody was faster.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """
    written: str | None = _store(uri).write_if(uri, content, version)
    return written


def delete_if(uri: str, version: str) -> None:
    """Delete an object if it still has this version.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """
    _store(uri).delete_if(uri, version)


def abort_uploads(uri: str) -> int:
    """Drop the parts of uploads below a folder that a kill left unfinished; returns how many.

    They are no objects and in no list, and cost money all the same on S3. None may be running.
    Google's and Azure's stores drop them by themselves after a week.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """
    return int(_store(uri).abort_uploads(uri)) if scheme(uri) == "s3" else 0


def _store(uri: str) -> Any:
    """The module that knows a URI's store."""
    return import_module(f"piflow.storage.{_MODULES[scheme(uri)]}")
