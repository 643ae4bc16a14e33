"""Object stores, for what pyarrow's file systems can't do: conditional writes, unfinished uploads.

And for what they don't say: why a request was refused. Through boto3, with time limits on every
request and adaptive retries: up to 8 tries, with waits that double, and a rate that falls while the
store throttles. After a refusal keys are looked for anew, so those that were renewed in the shared
credentials file are found; those of roles renew themselves.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

from piflow.storage.s3 import NO_KEYS, REMEDIES, client, error_code, forget_keys, s3_place

_Result = TypeVar("_Result")

MAX_BYTES = 2**20
"""Of an object that is written on a condition: it says whose a folder is."""

_UNMET = ("NoSuchKey", "404", "PreconditionFailed", "ConditionalRequestConflict")


def read(uri: str) -> tuple[bytes, str] | None:
    """Content and version (ETag) of an object; None: there is none.

    Of one that has more than `MAX_BYTES`, and so is none of piflow's, only the beginning.

    Raises:
        OSError: the store refuses or can't be reached; names the URI.
    """

    def get(store: Any, place: dict[str, str]) -> tuple[bytes, str]:
        reply = store.get_object(**place)
        return reply["Body"].read(MAX_BYTES), str(reply["ETag"])

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
    bucket, key, _ = s3_place(uri)

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

    bucket, key, _ = s3_place(uri)
    place = {"Bucket": bucket, "Key": key}
    try:
        try:
            return operation(client(uri), place)
        except ClientError as error:
            if error_code(error) not in REMEDIES:
                raise
            forget_keys()  # they may have been renewed
            return operation(client(uri), place)
    except ClientError as error:
        code = error_code(error)
        if code in _UNMET:
            return None
        if code in REMEDIES:
            raise PermissionError(errno.EACCES, f"{code}: {REMEDIES[code]}", uri) from error
        raise OSError(errno.EIO, str(error), uri) from error
    except NoCredentialsError as error:
        forget_keys()
        raise PermissionError(errno.EACCES, NO_KEYS, uri) from error
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error), uri) from error
