"""Object operations on a real S3 server, and one that refuses, throttles or says nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from piflow import storage
from piflow.runs import folder as run_folder
from piflow.storage import conditional, s3
from tests.servers import KEYS, S3Proxy, S3Server, s3_proxy, s3_uri

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    with s3_proxy(s3_server) as proxy:
        yield proxy


def test_a_write_is_refused_if_somebody_was_faster(any_store: str) -> None:
    uri = storage.join(any_store, "conditional", "object")
    first = conditional.write_if(uri, b"1", None)
    assert first is not None and conditional.write_if(uri, b"2", None) is None
    second = conditional.write_if(uri, b"3", first)
    assert second is not None and conditional.write_if(uri, b"4", first) is None
    if storage.scheme(uri) != "gs":  # fake-gcs-server heeds no condition of a deletion
        conditional.delete_if(uri, first)
    assert conditional.read(uri) == (b"3", second), "it has another version by now"
    conditional.delete_if(uri, second)
    assert conditional.read(uri) is None and conditional.write_if(uri, b"5", second) is None


def test_what_a_killed_upload_left_is_dropped(bucket: str) -> None:
    """Its parts are no object; finished checkpoints and other folders stay as they are."""
    run = storage.join(bucket, "killed-upload")
    store = s3.client(run)
    for name in (f"{run_key(run)}/checkpoints/step_00000001/__0_0.distcp", "tests/other/x"):
        upload = store.create_multipart_upload(Bucket="piflow", Key=name)["UploadId"]
        store.upload_part(Bucket="piflow", Key=name, UploadId=upload, PartNumber=1, Body=b"1" * 99)
    assert storage.list_files(run) == []
    run_folder.delete_half_written(run)
    left = store.list_multipart_uploads(Bucket="piflow").get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["tests/other/x"]
    assert conditional.abort_uploads(storage.join(bucket, "other")) == 1
    assert not store.list_multipart_uploads(Bucket="piflow").get("Uploads")


def run_key(uri: str) -> str:
    return s3.s3_place(uri).key


def test_a_big_object_goes_up_in_parts_that_appear_together(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    proxy.answer = lambda method, path, headers: requests.append(f"{method} {path}")
    uri = storage.join(s3_uri(proxy.address), "parts")
    content = bytes(range(256)) * 2**17  # 32 MiB
    storage.write_bytes(uri, content)
    parts = [request for request in requests if "partNumber=" in request]
    assert len(parts) > 1 and any(r.startswith("POST") and "uploadId=" in r for r in requests)
    assert storage.read_bytes(uri) == content
    storage.delete_file(uri)


REFUSALS = {
    "ExpiredToken": "expired: renew them in ~/.aws/credentials",
    "InvalidAccessKeyId": "doesn't know this access key; check",
    "SignatureDoesNotMatch": "doesn't belong to the access key; check",
    "AccessDenied": "no right to do this here",
    "RequestTimeTooSkewed": "clock is more than 15 minutes",
}
OPERATIONS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "list": storage.list_files,
    "write": lambda uri: storage.write_bytes(uri, b"1"),
    "download": storage.local_folder,
    "write_if": lambda uri: conditional.write_if(uri, b"1", None),
    "ownership": conditional.read,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_says_why_and_what_to_do(
    proxy: S3Proxy, code: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == "RequestTimeTooSkewed":
        monkeypatch.setattr(s3, "ATTEMPTS", 2)  # worth another try: the client shifts its time
    uri = storage.join(s3_uri(proxy.address), "refused")
    requests: list[str] = []

    def refuse(method: str, path: str, headers: object) -> tuple[int, str, str]:
        requests.append(method)
        return 400 if code == "ExpiredToken" else 403, code, "in the server's words"

    proxy.answer = refuse
    began = time.monotonic()
    with pytest.raises(PermissionError, match=f"{code}: .*{REFUSALS[code]}") as caught:
        OPERATIONS[operation](uri)
    assert "/refused" in str(caught.value)
    assert time.monotonic() - began < 8 and len(requests) <= 10, "a refusal is not an outage"


def test_no_keys_at_all(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    s3.forget_keys()
    with pytest.raises(PermissionError, match="no keys: set the variables AWS_ACCESS_KEY_ID"):
        conditional.read(storage.join(bucket, "x"))
    with pytest.raises(OSError, match="AccessDenied|no keys: set"):
        storage.read_bytes(storage.join(bucket, "x"))
    s3.forget_keys()


def test_throttling_is_sat_out(proxy: S3Proxy) -> None:
    """Both clients try again, and the rest is done."""
    uri = storage.join(s3_uri(proxy.address), "throttled")
    left = [3]

    def throttle(method: str, path: str, headers: object) -> tuple[int, str, str] | None:
        left[0] -= 1
        return (503, "SlowDown", "please") if left[0] >= 0 else None

    proxy.answer = throttle
    storage.write_bytes(uri, b"pyarrow")
    assert left[0] < 0
    left[0] = 3
    found = conditional.read(uri)
    assert found is not None and found[0] == b"pyarrow" and left[0] < 0
    storage.delete_file(uri)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients have time limits; here short ones."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"{s3_uri(f'127.0.0.1:{silent.getsockname()[1]}')}"
        for operation in (storage.list_files, conditional.read):
            began = time.monotonic()
            with pytest.raises(OSError, match="(?i)time"):
                operation(uri)
            assert 0.5 < time.monotonic() - began < 20


def test_renewed_keys_in_the_credentials_file_are_found(
    proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process goes on: both clients read the file again when a request is made."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def use(key: str, secret: str) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
        file.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")

    def only_new(method: str, path: str, headers: object) -> tuple[int, str, str] | None:
        old = "Credential=old/" in str(headers["Authorization"])  # type: ignore[index]
        return (400, "ExpiredToken", "The provided token has expired.") if old else None

    proxy.answer = only_new
    uri = storage.join(s3_uri(proxy.address), "renewed")
    use("old", "whatever")
    with pytest.raises(PermissionError, match="have expired"):
        storage.write_bytes(uri, b"1")
    with pytest.raises(PermissionError, match="have expired"):
        conditional.read(uri)
    use("piflow", "only-for-tests")
    storage.write_bytes(uri, b"1")
    found = conditional.read(uri)
    assert found is not None and found[0] == b"1"
    storage.delete_file(uri)
