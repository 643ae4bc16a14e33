"""Azure Blob Storage: URIs, clients, uploads that are whole or invisible, writes on a condition.

Credentials: AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN of the account in AZURE_STORAGE_ACCOUNT
(of any, if that is empty), else what Azure's DefaultAzureCredential finds: a service principal
in AZURE_CLIENT_ID and so on, the identity of workload or machine, `az login`. Tokens are sent to
Azure alone: a store at an address of one's own gets signatures by AZURE_STORAGE_KEY.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from piflow.storage.answers import knock
from piflow.storage.foreign import redacted, shown
from piflow.storage.object_uri import store_key_options

if TYPE_CHECKING:
    from pyarrow import fs

_Result = TypeVar("_Result")

CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 60.0  # time limits of a request

_OPTIONS = ("endpoint_override", "scheme")

# an account's key or token must reach nobody else, so the clouds are listed
_PLACE = re.compile(
    r"(?P<container>[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){2,62})@(?P<account>[a-z0-9]{3,24})"
    r"\.(?:dfs|blob)\.(?P<cloud>core\.windows\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net)"
)

# pyarrow gives code, status and text in one message
_FINAL = re.compile(r"Azure Error: \[\w*\] 4(?!08|29)\d\d")
_REFUSED = re.compile(r"Azure Error: \[(\w*)\] 40[13]|AuthenticationException")

_CREDENTIALS = (
    "AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN (of the account in AZURE_STORAGE_ACCOUNT), a "
    "service principal in AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, the workload's "
    "or the machine's identity, or `az login`"
)


class AzurePlace(NamedTuple):
    """What an ``abfs://`` URI names."""

    container: str
    account: str
    cloud: str  # core.windows.net
    key: str
    options: dict[str, str]  # endpoint_override, scheme, if they are given

    @property
    def address(self) -> str:
        """Where the account's blobs are served."""
        host = self.options.get("endpoint_override")
        if host is None:
            return f"https://{self.account}.blob.{self.cloud}"
        return f"{self.options.get('scheme', 'https')}://{host}/{self.account}"

    @property
    def is_ours(self) -> bool:
        """Whether the store has an address of one's own."""
        return "endpoint_override" in self.options


def azure_place(uri: str) -> AzurePlace:
    """Take an ``abfs://`` URI apart.

    Raises:
        ValueError: it names no container of an account in one of Azure's clouds, or has unknown or
            doubled options, or keys.
    """
    store, key, options = store_key_options(uri, _OPTIONS)
    found = _PLACE.fullmatch(store)
    if found is None:
        raise ValueError(
            f"ABFS URI {redacted(uri)!r} names no container of an account; expected "
            "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/prefix (or core.chinacloudapi.cn, "
            f"core.usgovcloudapi.net). Keys never stand in a URI: {_CREDENTIALS} count"
        )
    return AzurePlace(found["container"], found["account"], found["cloud"], key, options)


def _keys(place: AzurePlace) -> dict[str, str]:
    """The account's key or token, if a variable holds it; {}: Azure's own search counts.

    Raises:
        PermissionError: a store of one's own, and no key.
    """
    ours = os.environ.get("AZURE_STORAGE_ACCOUNT")
    if ours in (None, "", place.account):
        if key := os.environ.get("AZURE_STORAGE_KEY"):
            return {"account_key": key}
        token = os.environ.get("AZURE_STORAGE_SAS_TOKEN")
        if token and not place.is_ours:
            return {"sas_token": token.lstrip("?")}
    if place.is_ours:
        raise PermissionError(
            errno.EACCES,
            f"the store at {place.address} needs AZURE_STORAGE_KEY (and AZURE_STORAGE_ACCOUNT = "
            f"{place.account}, or none); tokens for Azure aren't sent to other addresses",
        )
    return {}


def azure_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """A client, and the path in it; one is kept for each account and key. For reading and lists.

    Its streams for writing make an empty blob first: `upload` doesn't.
    """
    place = azure_place(uri)
    if place.is_ours:
        _answers(place.address)
    system = _filesystem(place.account, place.cloud, **_ours(place))
    return system, f"{place.container}/{place.key}" if place.key else place.container


def _ours(place: AzurePlace) -> dict[str, str]:
    """Keys, and the address of a store of one's own."""
    host = place.options.get("endpoint_override")
    if host is None:
        return _keys(place)
    return {**_keys(place), "host": host, "protocol": place.options.get("scheme", "https")}


@lru_cache(maxsize=32)
def _filesystem(
    account: str, cloud: str, host: str | None = None, protocol: str = "https", **keys: str
) -> fs.FileSystem:
    from pyarrow import fs

    from piflow.storage.patient import PatientFileSystem

    system = fs.AzureFileSystem(
        account,
        blob_storage_authority=host or f".blob.{cloud}",
        dfs_storage_authority=host or f".dfs.{cloud}",
        blob_storage_scheme=protocol,
        dfs_storage_scheme=protocol,
        **keys,
    )
    return fs.PyFileSystem(PatientFileSystem(system, _is_passing))


def _is_passing(error: OSError) -> bool:
    """Whether pyarrow's client met an outage or a store that throttles."""
    text = str(error)
    return "Azure Error:" in text and not _FINAL.search(text)


@lru_cache(maxsize=32)
def _answers(address: str) -> None:
    knock(address, CONNECT_SECONDS, REQUEST_SECONDS)


def refusal(error: BaseException) -> str | None:
    """Why Azure refused a request of pyarrow's, and what to do; None: it is another error."""
    found = _REFUSED.search(str(error))
    if found is None:
        return None
    return f"{found[1] or 'no credentials that Azure takes'}. Check {_CREDENTIALS}"


def upload(uri: str, content: bytes | memoryview | IO[bytes] | Iterable[bytes]) -> None:
    """Write a blob of any size, whole or not at all: its blocks count once all have come.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """
    with _errors(uri):
        data = bytes(content) if isinstance(content, memoryview) else content
        _blob(uri).upload_blob(data, overwrite=True)


# ---------------------------------------------------------------------- blobs on a condition


def read(uri: str, max_bytes: int) -> tuple[bytes, str] | None:
    def get(blob: Any) -> tuple[bytes, str]:
        reply = blob.download_blob(offset=0, length=max_bytes)
        return reply.readall(), str(reply.properties.etag)

    return _unless_unmet(uri, get)


def write_if(uri: str, content: bytes, version: str | None) -> str | None:
    condition: dict[str, Any] = {"overwrite": False} if version is None else _unchanged(version)
    return _unless_unmet(uri, lambda blob: str(blob.upload_blob(content, **condition)["etag"]))


def delete_if(uri: str, version: str) -> None:
    condition = _unchanged(version)
    del condition["overwrite"]
    _unless_unmet(uri, lambda blob: blob.delete_blob(**condition))


def _unchanged(version: str) -> dict[str, Any]:
    from azure.core import MatchConditions

    return {
        "overwrite": True,
        "etag": version,
        "match_condition": MatchConditions.IfNotModified,
    }


def _blob(uri: str) -> Any:
    place = azure_place(uri)
    if place.is_ours:
        _answers(place.address)
    client = _client(place.address, place.account, **_keys(place))
    return client.get_blob_client(place.container, place.key)


@lru_cache(maxsize=32)
def _client(
    address: str, account: str, account_key: str | None = None, sas_token: str | None = None
) -> Any:
    try:
        from azure.identity import DefaultAzureCredential
        from azure.storage.blob import BlobServiceClient, ExponentialRetry
    except ImportError as error:
        raise ModuleNotFoundError(
            "abfs:// needs Azure's clients: pip install 'piflow[azure]'", name="azure.storage.blob"
        ) from error
    credential: Any = sas_token
    if account_key is not None:
        credential = {"account_name": account, "account_key": account_key}
    return BlobServiceClient(
        address,
        credential=credential or DefaultAzureCredential(),
        connection_timeout=CONNECT_SECONDS,
        read_timeout=REQUEST_SECONDS,
        # waits of 1, 3, 5, 9 and 17 s
        retry_policy=ExponentialRetry(initial_backoff=1, increment_base=2, retry_total=5),
    )


def _unless_unmet(uri: str, operation: Callable[[Any], _Result]) -> _Result | None:
    """What the operation returns; None if there is no such blob, or it has another version."""
    with _errors(uri):
        blob = _blob(uri)
        from azure.core.exceptions import (
            ResourceExistsError,
            ResourceModifiedError,
            ResourceNotFoundError,
        )

        try:
            return operation(blob)
        except (ResourceExistsError, ResourceModifiedError, ResourceNotFoundError):
            return None


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """The client's errors as OSError."""
    try:
        from azure.core.exceptions import AzureError, ClientAuthenticationError
    except ImportError as error:
        raise ModuleNotFoundError(
            "abfs:// needs Azure's clients: pip install 'piflow[azure]'", name="azure.storage.blob"
        ) from error
    try:
        yield
    except AzureError as error:
        told = shown(error.message.partition("\n")[0], 300)  # the rest is the answer's XML
        if isinstance(error, ClientAuthenticationError) or _status(error) == 403:
            told = f"{told} Check {_CREDENTIALS}"
            raise PermissionError(errno.EACCES, told, redacted(uri)) from error
        raise OSError(errno.EIO, told, redacted(uri)) from error


def _status(error: BaseException) -> int | None:
    """Of the answer, if there was one."""
    status: int | None = getattr(error, "status_code", None)
    return status
