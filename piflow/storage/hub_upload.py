"""Files to a model repository on the Hugging Face hub, in one commit: all of them or none."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from piflow.storage.answers import answered_within
from piflow.storage.hub import ANSWER_SECONDS, hub_place

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OWN = ".gitattributes"  # the hub writes it into every repository


def hub_files(uri: str) -> list[str] | None:
    """Files of a model repository below the URI's folder; None: there is no such repository.

    Raises:
        PermissionError: it may not be read.
        ValueError: a URI of a data set, or with a revision.
    """
    from huggingface_hub import errors

    repository, folder = _writable(uri)
    with _explained(uri):
        try:
            names = answered_within(
                ANSWER_SECONDS, lambda: _api().list_repo_files(repository), "the hub"
            )
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return None
    prefix = f"{folder}/" if folder else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return [name for name in inside if name != _OWN]


def hub_commit(uri: str, files: Mapping[str, Path | bytes], message: str, *, private: bool) -> str:
    """Write files below the URI's folder, in one commit; makes the repository if there is none.

    Args:
        files: path in the folder -> a local file or a content.
        private: of a new repository.

    Returns:
        The commit's page.

    Raises:
        PermissionError: no token, or one that gives no right to write there.
        ValueError: a URI of a data set, or with a revision.
    """
    from huggingface_hub import CommitOperationAdd

    repository, folder = _writable(uri)
    prefix = f"{folder}/" if folder else ""
    operations = [
        CommitOperationAdd(
            f"{prefix}{name}", content if isinstance(content, bytes) else str(content)
        )
        for name, content in sorted(files.items())
    ]
    with _explained(uri):
        api = _api()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=message)
    return str(done.commit_url)


def _writable(uri: str) -> tuple[str, str]:
    place = hub_place(uri)
    if place.repo_type != "model" or place.revision is not None:
        raise ValueError(
            f"expected hf://owner/name or hf://owner/name/folder to write to, got {uri}: data sets "
            "and revisions aren't written"
        )
    return place.repo_id, place.path


def _api() -> HfApi:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise PermissionError(
            errno.EACCES,
            "no token of the hub: set HF_TOKEN to one that may write, or log in with `hf auth "
            "login`",
        )
    return HfApi()


class _explained:
    """The hub's refusals as PermissionError, with what to do."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from huggingface_hub import errors

        if not isinstance(error, errors.HfHubHTTPError):
            return
        status = None if error.response is None else error.response.status_code
        if status == 401:
            told = "the hub doesn't know the token in HF_TOKEN: make a new one in your settings"
        elif status == 403:
            told = (
                "the token in HF_TOKEN has no right to write there: it must be of the owner, or of "
                "a member of the organisation, and be allowed to write"
            )
        else:
            return
        raise PermissionError(errno.EACCES, told, self._uri) from error
