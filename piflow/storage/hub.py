"""Models and data sets on the Hugging Face hub, read only."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

from piflow.storage.foreign import redacted

if TYPE_CHECKING:
    from pyarrow import fs

_HUB_URI = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?"
)

# names that would lie outside of the snapshot's folder
_OUTSIDE = ["/*", "..", "../*", "*/../*", "*/.."]


@dataclass(frozen=True)
class _HubPlace:
    """What a hub URI names."""

    repo_type: Literal["model", "dataset"]
    repo_id: str
    revision: str | None
    path: str  # inside the repository; "" is its root


def hub_place(uri: str) -> _HubPlace:
    """Take a hub URI apart.

    Raises:
        ValueError: it names no repository, or a path that leads out of it.
    """
    match = _HUB_URI.fullmatch(uri)
    if match is None or match["repo"].startswith(("datasets/", "spaces/", "buckets/")):
        raise ValueError(
            f"hub URI {redacted(uri)!r} names no repository; expected hf://owner/name/folder, or "
            "hf://datasets/owner/name/folder, with @revision after the name if it isn't main"
        )
    path = (match["path"] or "").strip("/")
    if any(part in (".", "..") for part in path.split("/")):
        raise ValueError(
            f"hub URI {redacted(uri)!r} leads out of its folder; write the path without '..'"
        )
    return _HubPlace(
        repo_type="dataset" if match["kind"] else "model",
        repo_id=match["repo"],
        revision=None if match["revision"] is None else unquote(match["revision"]),
        path=path,
    )


def hub_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The hub's files, read by ranges over HTTP."""
    from pyarrow import fs

    place = hub_place(uri)
    with _hub_errors(uri):
        from huggingface_hub import HfFileSystem

        system = HfFileSystem()
        system.resolve_path(uri)  # otherwise a repository one may not read is one without files
    prefix = "datasets/" if place.repo_type == "dataset" else ""
    revision = "" if place.revision is None else f"@{quote(place.revision, safe='')}"
    path = f"{prefix}{place.repo_id}{revision}/{place.path}".rstrip("/")
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def hub_snapshot(uri: str) -> Path:
    """The folder's files in the hub client's own cache, which knows what it has already."""
    place = hub_place(uri)
    with _hub_errors(uri):
        from huggingface_hub import snapshot_download

        root = snapshot_download(
            place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            allow_patterns=f"{place.path}/*" if place.path else None,
            ignore_patterns=_OUTSIDE,
        )
    folder = Path(root, place.path)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder, or it is empty", uri)
    return folder


@contextmanager
def _hub_errors(uri: str) -> Iterator[None]:
    """The hub client's errors, with what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, FileNotFoundError) as error:
        # the file system calls all of them "not found"
        cause = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
        code = errno.EACCES
        if isinstance(cause, errors.GatedRepoError):
            reason = (
                "its licence must be accepted on its page first, and HF_TOKEN must be a token of "
                "the account that did"
            )
        elif isinstance(cause, errors.RevisionNotFoundError):
            code, reason = errno.ENOENT, "the repository has no such revision"
        elif isinstance(cause, errors.RepositoryNotFoundError):
            reason = "no such repository, or HF_TOKEN gives no access to it"
        else:
            raise
        raise OSError(code, reason, uri) from error  # Python makes it the code's own class
