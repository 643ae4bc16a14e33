"""Object stores, for what pyarrow's file systems can't do: conditional writes, unfinished uploads.

And for what they don't say: why a request was refused. Through boto3, with time limits on every
request and adaptive retries: up to 8 tries, with waits that double, and a rate that falls while the
store throttles. After a refusal keys are looked for anew, so those that were renewed in the shared
credentials file are found; those of roles renew themselves.
"""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from piflow import storage

_Result = TypeVar("_Result")
_UNMET = ("NoSuchKey", "404", "PreconditionFailed", "ConditionalRequestConflict")

_KEYS = (
    "the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile in ~/.aws/credentials "
    "or the machine's role"
)
_NO_KEYS = f"no keys: set {_KEYS}"
_RENEW = (
    "the keys have expired: renew them in ~/.aws/credentials, which is read again, or use a role "
    "that renews itself; keys in variables last as long as the process, so start it again with "
    "new ones. A run goes on from its newest checkpoint"
)
_REMEDIES = {
    "ExpiredToken": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidToken": f"the session token doesn't belong to the keys; check {_KEYS}",
    "InvalidAccessKeyId": f"the store doesn't know this access key; check {_KEYS}",
    "SignatureDoesNotMatch": f"the secret doesn't belong to the access key; check {_KEYS}",
    "AccessDenied": "these keys have no right to do this here; give them one, or use others: check "
    + _KEYS,
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes from the store's; set it "
    "(NTP)",
}


def refusal(uri: str) -> str | None:
    """Why the store lets these keys do nothing here: its error code, and what to do.

    Asks once more, for a list of one object, which answers in words where other requests don't.
    None: it does let them, or it can't be reached, or there is no boto3 to ask with.
    """
    if importlib.util.find_spec("boto3") is None:
        return None
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, key, _ = storage.s3_place(uri)
    forget_keys()
    try:
        client(uri).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    except ClientError as error:
        code = _code(error)
        return f"{code}: {_REMEDIES[code]}" if code in _REMEDIES else None
    except NoCredentialsError:
        return _NO_KEYS
    except BotoCoreError:
        return None
    return None


def client(uri: str) -> Any:
    """A boto3 client for the store of an ``s3://`` URI; one is kept for each store.

    Raises:
        ModuleNotFoundError: boto3 isn't installed.
    """
    options = storage.s3_place(uri).options
    endpoint = options.get("endpoint_override")
    address = f"{options.get('scheme', 'https')}://{endpoint}" if endpoint else None
    return _client(address, options.get("region"), storage.ATTEMPTS)


def forget_keys() -> None:
    """The next request looks for keys anew; so it is after each refusal."""
    _client.cache_clear()


@lru_cache
def _client(endpoint: str | None, region: str | None, attempts: int) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        region_name=region,
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=storage.CONNECT_SECONDS,
            read_timeout=storage.REQUEST_SECONDS,
            retries={"mode": "adaptive", "total_max_attempts": attempts},
            s3={"addressing_style": "path"} if endpoint else None,
        ),
    )


def read(uri: str) -> tuple[bytes, str] | None:
    """Content and version (ETag) of an object; None: there is none.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """

    def get(store: Any, place: dict[str, str]) -> tuple[bytes, str]:
        reply = store.get_object(**place)
        return reply["Body"].read(), str(reply["ETag"])

    return _unless_unmet(uri, get)


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
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    return _unless_unmet(
        uri,
        lambda store, place: str(store.put_object(**place, Body=content, **condition)["ETag"]),
    )


def delete_if(uri: str, version: str) -> None:
    """Delete an object if it still has this version.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """
    _unless_unmet(uri, lambda store, place: store.delete_object(**place, IfMatch=version))


def abort_uploads(uri: str) -> int:
    """Drop the parts of uploads below a folder that a kill left unfinished; returns how many.

    They are no objects and in no list, and cost money all the same. None may be running.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """
    bucket, key, _ = storage.s3_place(uri)

    def abort(store: Any, _: dict[str, str]) -> int:
        pages = store.get_paginator("list_multipart_uploads").paginate(
            Bucket=bucket, Prefix=f"{key}/"
        )
        left = [upload for page in pages for upload in page.get("Uploads", [])]
        for upload in left:
            store.abort_multipart_upload(
                Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        return len(left)

    return _unless_unmet(uri, abort) or 0


def _unless_unmet(uri: str, operation: Callable[[Any, dict[str, str]], _Result]) -> _Result | None:
    """What the operation returns; None if there is no such object, or it has another version."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, key, _ = storage.s3_place(uri)
    place = {"Bucket": bucket, "Key": key}
    try:
        try:
            return operation(client(uri), place)
        except ClientError as error:
            if _code(error) not in _REMEDIES:
                raise
            forget_keys()  # they may have been renewed
            return operation(client(uri), place)
    except ClientError as error:
        code = _code(error)
        if code in _UNMET:
            return None
        if code in _REMEDIES:
            raise PermissionError(errno.EACCES, f"{code}: {_REMEDIES[code]}", uri) from error
        raise OSError(errno.EIO, str(error), uri) from error
    except NoCredentialsError as error:
        forget_keys()
        raise PermissionError(errno.EACCES, _NO_KEYS, uri) from error
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error), uri) from error


def _code(error: Any) -> str:
    """The store's name for what went wrong."""
    return str(error.response["Error"].get("Code", ""))
