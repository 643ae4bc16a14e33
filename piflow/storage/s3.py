"""S3 and its kin: clients, options in a URI, and why a request was refused."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from piflow.storage.answers import knock
from piflow.storage.foreign import redacted, shown
from piflow.storage.object_uri import HOST, store_key_options

if TYPE_CHECKING:
    from pyarrow import fs

CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 60.0  # time limits of a request to an object store

ATTEMPTS = 8  # of a request; the waits between them add up to 20 to 60 s

_S3_OPTIONS = ("endpoint_override", "region", "scheme")

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # the first that is set counts

_CREDENTIAL_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def s3_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """An S3 client with time limits and retries, and the path in it; one is kept for each store."""
    place = s3_place(uri)
    bucket, key, options = place
    scheme, endpoint = place.endpoint()
    region = options.get("region") or (None if endpoint else _aws_region(bucket))
    system = _filesystem(region, scheme, endpoint, _credentials_state())
    return system, f"{bucket}/{key}" if key else bucket


def _credentials_state() -> tuple[str | int | None, ...]:
    """What changes whenever variables or files hold other keys."""
    variables = [os.environ.get(name) for name in _CREDENTIAL_VARIABLES]
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    try:
        written = os.stat(os.path.expanduser(file)).st_mtime_ns
    except OSError:
        written = None
    return (*variables, file, written)


@lru_cache(maxsize=32)
def _filesystem(
    region: str | None, scheme: str, endpoint: str | None, keys: tuple[str | int | None, ...]
) -> fs.FileSystem:
    """A client: to make one costs 20 ms, and every new one connects anew.

    Args:
        keys: what `_credentials_state` says; another one, another client.
    """
    from pyarrow import fs

    if endpoint is not None:
        knock(f"{scheme}://{endpoint}", CONNECT_SECONDS, REQUEST_SECONDS)
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Whoever has keys needs no role's from the machine's metadata service. Each new client asks
        # it for a region nevertheless, and waits for 3 s where the network drops such requests.
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    return fs.S3FileSystem(
        region=region,
        scheme=scheme,
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


@lru_cache(maxsize=256)
def _aws_region(bucket: str) -> str:
    """An AWS bucket's region, which costs a request: asked once a process."""
    from pyarrow import fs

    return str(fs.resolve_s3_region(bucket))


class S3Place(NamedTuple):
    """What an S3 URI names."""

    bucket: str
    key: str
    options: dict[str, str]  # endpoint_override, region, scheme, if they are given

    def endpoint(self) -> tuple[str, str | None]:
        """Protocol and host of the store; None: AWS.

        What the URI says counts, then AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL.

        Raises:
            ValueError: the variable holds no URL of a host.
        """
        protocol = self.options.get("scheme", "https")
        if host := self.options.get("endpoint_override"):
            return protocol, host
        variable = next((name for name in _ENDPOINT_VARIABLES if os.environ.get(name)), None)
        if variable is None:
            return protocol, None
        protocol, separator, host = os.environ[variable].rstrip("/").partition("://")
        if not separator or protocol not in ("http", "https") or not HOST.fullmatch(host):
            raise ValueError(
                f"{variable} is {redacted(os.environ[variable])!r}; expected http://host:port or "
                "https://host"
            )
        return protocol, host


def s3_place(uri: str) -> S3Place:
    """Take an S3 URI apart.

    Raises:
        ValueError: it names no bucket, has unknown or doubled options, or holds keys; the message
            doesn't repeat them.
    """
    bucket = uri.removeprefix("s3://").partition("?")[0].partition("/")[0]
    if "@" in bucket or ":" in bucket:
        raise ValueError(
            f"the S3 URI {redacted(uri) if '@' in bucket else 's3://…'!r} holds keys or a port, "
            "and keys would end up in logs; expected s3://bucket/prefix, with the keys in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and a host in ?endpoint_override="
        )
    bucket, key, options = store_key_options(uri, _S3_OPTIONS)
    if not bucket:
        raise ValueError(f"S3 URI {redacted(uri)!r} names no bucket; expected s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"S3 URI {redacted(uri)!r} has the bucket {shown(bucket)!r}, which no store has; "
            "expected letters, digits, '.', '-' and '_'"
        )
    return S3Place(bucket, key, options)


_KEYS = (
    "the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile in ~/.aws/credentials "
    "or the machine's role"
)

NO_KEYS = f"no keys: set {_KEYS}"

_RENEW = (
    "the keys have expired: renew them in ~/.aws/credentials, which is read again, or use a role "
    "that renews itself; keys in variables last as long as the process, so start it again with "
    "new ones. A run goes on from its newest checkpoint"
)

REMEDIES = {
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

    bucket, key, _ = s3_place(uri)
    forget_keys()
    try:
        client(uri).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    except ClientError as error:
        code = error_code(error)
        return f"{code}: {REMEDIES[code]}" if code in REMEDIES else None
    except NoCredentialsError:
        return NO_KEYS
    except BotoCoreError:
        return None
    return None


def client(uri: str) -> Any:
    """A boto3 client for the store of an ``s3://`` URI; one is kept for each store.

    Raises:
        ModuleNotFoundError: boto3 isn't installed.
    """
    place = s3_place(uri)
    protocol, endpoint = place.endpoint()
    address = f"{protocol}://{endpoint}" if endpoint else None
    return _client(address, place.options.get("region"), ATTEMPTS)


def forget_keys() -> None:
    """The next request looks for keys anew; so it is after each refusal."""
    _client.cache_clear()
    _filesystem.cache_clear()


@lru_cache
def _client(endpoint: str | None, region: str | None, attempts: int) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        region_name=region,
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=REQUEST_SECONDS,
            retries={"mode": "adaptive", "total_max_attempts": attempts},
            s3={"addressing_style": "path"} if endpoint else None,
            ignore_configured_endpoint_urls=True,  # of ~/.aws/config: pyarrow follows none
        ),
    )


def error_code(error: Any) -> str:
    """The store's name for what went wrong."""
    return str(error.response["Error"].get("Code", ""))
