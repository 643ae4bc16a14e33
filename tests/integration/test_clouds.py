"""Google's and Azure's object stores, where they differ from S3: uploads, outages, credentials."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from piflow import storage
from piflow.storage import azure, conditional
from tests.servers import AZURITE_KEY, AzureServer, GcsServer, Server

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["gcs", "azure"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


def test_an_object_is_there_when_all_of_it_is(server: Server) -> None:
    """While it is written the earlier one is read, and so it is after an upload that failed."""
    uri = storage.join(server.uri, "whole/object")
    storage.write_bytes(uri, b"before")
    seen = []

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(6 * 2**20)
            seen.append(storage.read_bytes(uri))
        raise RuntimeError("the disk that it came from is gone")

    if storage.scheme(uri) == "abfs":
        with pytest.raises(RuntimeError):
            azure.upload(uri, pieces())
    else:
        system, path = storage.filesystem(uri)
        stream = system.open_output_stream(path, compression=None)
        with pytest.raises(RuntimeError):
            for piece in pieces():
                stream.write(piece)
        assert storage.read_bytes(uri) == b"before"
        stream.close()
        return
    assert seen == [b"before"] * 3 and storage.read_bytes(uri) == b"before"


def test_folders_go_up_and_come_back(server: Server, tmp_path: Path) -> None:
    names = ("state.json", "a/b c#1%.bin", "a/é.bin")
    for name in names:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(name.encode())
    uri = storage.join(server.uri, "folder")
    storage.upload_folder(uri, tmp_path / "here")
    assert storage.list_files(uri) == sorted(names)
    back = storage.local_folder(uri, tmp_path / "cache")
    assert {name: (back / name).read_bytes() for name in names} == {
        name: name.encode() for name in names
    }
    assert storage.read_bytes(storage.member(uri, names[1])) == names[1].encode()
    assert storage.expand(storage.join(uri, "a", "*.bin")) == [
        storage.member(uri, name) for name in sorted(names[1:])
    ]
    with pytest.raises(ValueError, match="a root; name a folder inside"):
        storage.delete_folder(uri.replace("/tests/folder", ""))


@pytest.mark.parametrize("kind", [GcsServer, AzureServer])
def test_an_outage_is_sat_out(
    kind: type[GcsServer | AzureServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is away for some seconds costs some seconds, with either client."""
    monkeypatch.setenv("AZURE_STORAGE_KEY", AZURITE_KEY)
    with kind(tmp_path).running() as server:
        uri = storage.join(server.uri, "outage")
        version = conditional.write_if(uri, b"1", None)
        for operation in (
            lambda: storage.write_bytes(uri, b"2"),
            lambda: storage.read_bytes(uri),
            lambda: conditional.read(uri),
        ):
            server.end()
            threading.Timer(2.0, server.start).start()
            began = time.monotonic()
            operation()
            assert time.monotonic() - began > 1, "it was away"
        assert version is not None and conditional.write_if(uri, b"3", version) is None
        assert storage.read_bytes(uri) == b"2"


def test_a_wrong_key_is_refused_with_what_to_do(
    azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "AAAA" + AZURITE_KEY[4:]
    monkeypatch.setenv("AZURE_STORAGE_KEY", wrong)
    uri = storage.join(azure_server.uri, "refused")
    for operation in (
        storage.read_bytes,
        storage.list_files,
        lambda uri: storage.write_bytes(uri, b"1"),
        conditional.read,
    ):
        with pytest.raises(PermissionError, match="Check AZURE_STORAGE_KEY") as caught:
            operation(uri)
        assert "refused" in str(caught.value) and wrong not in str(caught.value)


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[str]]]:
    """Somebody's server: its host and port, and the headers that it was sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            sent.append(f"{self.command} {self.path}\n{self.headers}")
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 http.server's names

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", sent
    server.shutdown()
    server.server_close()
    thread.join(20)


def test_googles_credentials_go_to_nobody_else(
    stranger: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, sent = stranger
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "k",
        "private_key": key.decode(),
        "client_email": "planted@p.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"http://{host}/token",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    uri = f"gs://bucket/a?endpoint_override={host}&scheme=http"
    assert not storage.exists(uri)
    assert conditional.read(uri) is None
    conditional.delete_if(uri, "7")
    assert any("ifGenerationMatch=7" in request for request in sent), "fake-gcs-server ignores it"
    assert len(sent) >= 3 and not any("authorization" in request.lower() for request in sent)


def test_azures_tokens_go_to_nobody_else(
    stranger: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signature shows nothing of the key; a token would be all that one needs."""
    host, sent = stranger
    monkeypatch.delenv("AZURE_STORAGE_KEY", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2024&sig=planted")
    uri = f"abfs://data@account.dfs.core.windows.net/a?endpoint_override={host}&scheme=http"
    for operation in (storage.exists, conditional.read):
        with pytest.raises(
            PermissionError, match="tokens for Azure aren't sent to other addresses"
        ):
            operation(uri)
    monkeypatch.setenv("AZURE_STORAGE_KEY", AZURITE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "another")
    with pytest.raises(PermissionError, match="AZURE_STORAGE_ACCOUNT = account"):
        storage.exists(uri)
    assert not any("planted" in request or "uthorization" in request for request in sent)


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", AZURITE_KEY)
    for module in ("gcs", "azure"):
        monkeypatch.setattr(f"piflow.storage.{module}.REQUEST_SECONDS", 0.5)
        monkeypatch.setattr(f"piflow.storage.{module}.CONNECT_SECONDS", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = f"endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
        for place in ("gs://bucket/a", "abfs://data@account.dfs.core.windows.net/a"):
            for operation in (storage.list_files, conditional.read):
                began = time.monotonic()
                with pytest.raises(OSError, match="gave no whole answer in time"):
                    operation(f"{place}?{options}")
                assert time.monotonic() - began < 20
