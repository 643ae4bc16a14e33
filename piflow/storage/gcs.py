"""Google Cloud Storage: URIs, clients, objects that are written on a condition, refusals.

Credentials are Google's Application Default Credentials: GOOGLE_APPLICATION_CREDENTIALS, `gcloud
auth application-default login`, or the service account of machine or pod. A store at an address of
one's own gets none of them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from piflow.storage.answers import knock
from piflow.storage.foreign import redacted, shown
from piflow.storage.object_uri import store_key_options

if TYPE_CHECKING:
    from pyarrow import fs

_Result = TypeVar("_Result")

CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 60.0  # time limits of a request

_OPTIONS = ("endpoint_override", "scheme")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")

# pyarrow gives the status and its text in one message, with no field for either
_REFUSED = re.compile(
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED)\b|Could not create a OAuth2 access token"
)

_CREDENTIALS = (
    "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the service "
    "account of machine or pod"
)


class GcsPlace(NamedTuple):
    """What a ``gs://`` URI names."""

    bucket: str
    key: str
    options: dict[str, str]  # endpoint_override, scheme, if they are given

    @property
    def address(self) -> str | None:
        """Of a store of one's own; None: Google's."""
        host = self.options.get("endpoint_override")
        return f"{self.options.get('scheme', 'https')}://{host}" if host else None


def gcs_place(uri: str) -> GcsPlace:
    """Take a ``gs://`` URI apart.

    Raises:
        ValueError: it names no bucket, or has unknown or doubled options, or keys.
    """
    bucket, key, options = store_key_options(uri, _OPTIONS)
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"GS URI {redacted(uri)!r} names no bucket that could be; expected gs://bucket/prefix "
            "of lower case letters, digits, '.', '-' and '_'. Keys never stand in a URI: "
            f"{_CREDENTIALS} count"
        )
    return GcsPlace(bucket, key, options)


def gcs_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """A client with retries, and the path in it; one is kept for each store."""
    place = gcs_place(uri)
    system = _filesystem(place.address, _credentials_state())
    return system, f"{place.bucket}/{place.key}" if place.key else place.bucket


def _credentials_state() -> tuple[str | int | None, ...]:
    """What changes whenever another file of credentials counts."""
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    try:
        return file, os.stat(file).st_mtime_ns if file else None
    except OSError:
        return file, None


@lru_cache(maxsize=32)
def _filesystem(address: str | None, credentials: tuple[str | int | None, ...]) -> fs.FileSystem:
    from pyarrow import fs

    limit = timedelta(seconds=REQUEST_SECONDS)
    if address is None:
        return fs.GcsFileSystem(retry_time_limit=limit)
    knock(address, CONNECT_SECONDS, REQUEST_SECONDS)
    scheme, _, host = address.partition("://")
    return fs.GcsFileSystem(
        anonymous=True, scheme=scheme, endpoint_override=host, retry_time_limit=limit
    )


def refusal(error: BaseException) -> str | None:
    """Why Google refused a request of pyarrow's, and what to do; None: it is another error."""
    found = _REFUSED.search(str(error))
    if found is None:
        return None
    if found[1] == "PERMISSION_DENIED":
        return f"this account has no right to do this here; give it one, or check {_CREDENTIALS}"
    return f"no credentials that Google takes; check {_CREDENTIALS}"


# ---------------------------------------------------------------------- objects on a condition


def read(uri: str, max_bytes: int) -> tuple[bytes, str] | None:
    def get(blob: Any) -> tuple[bytes, str]:
        blob.reload(timeout=REQUEST_SECONDS)
        generation = int(blob.generation)
        content = blob.download_as_bytes(
            end=max_bytes - 1, if_generation_match=generation, timeout=REQUEST_SECONDS
        )
        return content, str(generation)

    return _unless_unmet(uri, get)


def write_if(uri: str, content: bytes, version: str | None) -> str | None:
    def put(blob: Any) -> str:
        blob.upload_from_string(
            content, if_generation_match=int(version or 0), timeout=REQUEST_SECONDS
        )
        return str(blob.generation)

    return _unless_unmet(uri, put)


def delete_if(uri: str, version: str) -> None:
    _unless_unmet(
        uri, lambda blob: blob.delete(if_generation_match=int(version), timeout=REQUEST_SECONDS)
    )


@lru_cache(maxsize=32)
def _client(address: str | None, credentials: tuple[str | int | None, ...]) -> Any:
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage
    except ImportError as error:
        raise ModuleNotFoundError(
            "gs:// needs Google's client: pip install 'piflow[gcs]'", name="google.cloud.storage"
        ) from error
    # a project is asked for only to make buckets
    if address is None:
        return storage.Client(project="none")
    knock(address, CONNECT_SECONDS, REQUEST_SECONDS)
    return storage.Client(
        project="none",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": address},
    )


def _unless_unmet(uri: str, operation: Callable[[Any], _Result]) -> _Result | None:
    """What the operation returns; None if there is no such object, or it has another version."""
    place = gcs_place(uri)
    with _errors(uri):
        from google.api_core.exceptions import NotFound, PreconditionFailed

        bucket = _client(place.address, _credentials_state()).bucket(place.bucket)
        try:
            return operation(bucket.blob(place.key))
        except (NotFound, PreconditionFailed):
            return None


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """The client's errors as OSError."""
    from google.api_core.exceptions import Forbidden, GoogleAPIError, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    try:
        yield
    except (Forbidden, Unauthorized, GoogleAuthError) as error:
        told = f"{shown(error)}; check {_CREDENTIALS}"
        raise PermissionError(errno.EACCES, told, redacted(uri)) from error
    except (GoogleAPIError, RequestException) as error:
        raise OSError(errno.EIO, shown(error), redacted(uri)) from error
