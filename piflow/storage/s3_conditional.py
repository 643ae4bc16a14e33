"""S3's part of `conditional`: writes on a condition, and uploads that were never finished.

Through boto3, with time limits on every request and adaptive retries: up to 8 tries, with waits
that double, and a rate that falls while the store throttles. After a refusal keys are looked for
anew, so those that were renewed in the shared credentials file are found; those of roles renew
themselves.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

from piflow.storage.s3 import NO_KEYS, REMEDIES, client, error_code, forget_keys, s3_place

_Result = TypeVar("_Result")

_UNMET = ("NoSuchKey", "404", "PreconditionFailed", "ConditionalRequestConflict")


def read(uri: str, max_bytes: int) -> tuple[bytes, str] | None:
    def get(store: Any, place: dict[str, str]) -> tuple[bytes, str]:
        reply = store.get_object(**place)
        return reply["Body"].read(max_bytes), str(reply["ETag"])

    return _unless_unmet(uri, get)


def write_if(uri: str, content: bytes, version: str | None) -> str | None:
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    return _unless_unmet(
        uri,
        lambda store, place: str(store.put_object(**place, Body=content, **condition)["ETag"]),
    )


def delete_if(uri: str, version: str) -> None:
    _unless_unmet(uri, lambda store, place: store.delete_object(**place, IfMatch=version))


def abort_uploads(uri: str) -> int:
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
