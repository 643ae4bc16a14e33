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

from piflow.storage.answers import answered_within
from piflow.storage.foreign import redacted

if TYPE_CHECKING:
    from pyarrow import fs

_HUB_URI = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?"
)

ANSWER_SECONDS = 60.0
"""For a whole answer about a repository; downloads take as long as they take."""

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
        # otherwise a repository that one may not read is one without files
        answered_within(ANSWER_SECONDS, lambda: system.resolve_path(uri), "the hub")
    prefix = "datasets/" if place.repo_type == "dataset" else ""
    revision = "" if place.revision is None else f"@{quote(place.revision, safe='')}"
    path = f"{prefix}{place.repo_id}{revision}/{place.path}".rstrip("/")
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def hub_snapshot(uri: str) -> Path:
    """The folder's files in the hub client's own cache, which knows what it has already."""
    place = hub_place(uri)
    with _hub_errors(uri):
        from huggingface_hub import snapshot_download

        _known_commit(place)
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


def hub_at_commit(uri: str, commit: str | None = None) -> str:
    """The same place at one commit, whatever happens to the branch or tag that the URI names.

    Args:
        commit: hexadecimal; None: the one that is meant now, which without a network is the one
            that the client's cache has.

    Raises:
        OSError: there is no such repository or revision, or it can't be asked for.
    """
    place = hub_place(uri)
    if commit is None:
        with _hub_errors(uri):
            commit = _known_commit(place) or _cached_commit(place)
    kind = "datasets/" if place.repo_type == "dataset" else ""
    path = f"/{place.path}" if place.path else ""
    return f"hf://{kind}{place.repo_id}@{commit}{path}"


def hub_hashes(uri: str) -> dict[str, str]:
    """Hex sha256 of the large files right in a folder of a repository, as the hub has them.

    Raises:
        OSError: the hub refuses, or gives no whole answer in time.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    place = hub_place(uri)

    def listing() -> list[RepoFile]:
        found = HfApi().list_repo_tree(
            place.repo_id,
            place.path or None,
            repo_type=place.repo_type,
            revision=place.revision,
        )
        return [entry for entry in found if isinstance(entry, RepoFile)]

    with _hub_errors(uri):
        files = answered_within(ANSWER_SECONDS, listing, "the hub")
    return {Path(file.path).name: file.lfs.sha256 for file in files if file.lfs is not None}


def _known_commit(place: _HubPlace) -> str | None:
    """The commit that a place's revision names, as the hub says; None: it can't be asked.

    It is also how a hub that is there, and never finishes an answer, is told: its client would wait
    without end.

    Raises:
        TimeoutError: it is so.
    """
    from huggingface_hub import HfApi

    try:
        info = answered_within(
            ANSWER_SECONDS,
            lambda: HfApi().repo_info(
                place.repo_id, repo_type=place.repo_type, revision=place.revision
            ),
            "the hub",
        )
    except TimeoutError:
        raise
    except Exception:  # the client says it better, or has everything in its cache
        return None
    return info.sha


def _cached_commit(place: _HubPlace) -> str:
    from huggingface_hub import snapshot_download

    root = snapshot_download(
        place.repo_id,
        repo_type=place.repo_type,
        revision=place.revision,
        allow_patterns=[],  # nothing is fetched: the client asks, and takes what its cache knows
    )
    return Path(root).name


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
