"""Several `piflow embed` at one store, on a local disk and on a real S3 server; no Ray."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow import storage
from piflow.backbones.text import EncodedPrompt
from piflow.config import Recipe, parse_recipe
from piflow.data import embed
from piflow.data.layout import ShardPlan
from piflow.data.manifest import StoreError
from piflow.data.reader import EmbeddingStore
from piflow.data.shared_disk import (
    WRITER_FILE,
    SharedDiskError,
    one_writer,
    require_shared,
    require_visible,
)
from piflow.data.writer import write_shard
from piflow.runs import lease
from piflow.runs.lease import PROCESS
from piflow.storage.fingerprint import EncoderIdentity

pytestmark = pytest.mark.timeout(120)
IDENTITY = EncoderIdentity(name="test", weights_sha256="ab" * 32, max_tokens=5, hidden_size=8)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    return storage.join(request.getfixturevalue("bucket"), tmp_path.name)


@pytest.fixture
def recipe(store: str, tmp_path: Path) -> Recipe:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(7)))
    return parse_recipe(
        {
            "name": "writers",
            "run_dir": str(tmp_path / "run"),
            "model": {"path": "unused"},
            "encoder": {"path": "unused", "max_tokens": 5},
            "embed": {
                "prompts": str(tmp_path / "prompts.txt"), "store": store, "height": 32,
                "width": 32, "rows_per_shard": 2, "rows_per_group": 2,
            },
        }
    )  # fmt: skip


class Encoders:
    """In place of Ray's: a job comes to `encoding`, and writes its shards once it may."""

    def __init__(self) -> None:
        self.encoding, self.go_on = threading.Event(), threading.Event()

    def run(
        self, recipe: Recipe, job: Any, missing: list[ShardPlan], *_: object
    ) -> Generator[embed._Finished]:
        self.encoding.set()
        assert self.go_on.wait(60)
        for plan in missing:
            states = [EncodedPrompt(torch.ones(2, 8), None, False) for _ in plan.prompts]
            yield embed._Finished(*write_shard(job.store, plan, states, job.inputs))


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> Encoders:
    encoders = Encoders()
    monkeypatch.setattr(embed, "_encode", encoders.run)
    monkeypatch.setattr(embed, "encoder_identity", lambda _: IDENTITY)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 6.0)
    return encoders


def _embed(recipe: Recipe) -> None:
    embed.embed_prompts(recipe, lambda _: nullcontext(), show_progress=False)


def _negative(recipe: Recipe, text: str) -> Recipe:
    update = {"negative_prompt": text}
    return recipe.model_copy(update={"guidance": recipe.guidance.model_copy(update=update)})


def test_two_jobs_at_once_leave_one_whole_store(recipe: Recipe, encoders: Encoders) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_embed, recipe)
        assert encoders.encoding.wait(60)
        with pytest.raises(StoreError, match="is being written by process .*one `piflow embed`"):
            _embed(recipe)
        encoders.go_on.set()
        first.result(60)
    EmbeddingStore.open(recipe.embed.store).verify()
    _embed(recipe)  # there is nothing to do


def test_two_recipes_negative_prompts_are_both_kept(recipe: Recipe, encoders: Encoders) -> None:
    """Each read the manifest, added its own and wrote it: the first one's was gone."""
    encoders.go_on.set()
    _embed(recipe)
    encoders.go_on.clear()
    encoders.encoding.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_embed, _negative(recipe, "blurry"))
        assert encoders.encoding.wait(60)
        with pytest.raises(StoreError, match="Run this one again when that one has ended"):
            _embed(_negative(recipe, "noisy"))
        encoders.go_on.set()
        first.result(60)
    _embed(_negative(recipe, "noisy"))
    store = EmbeddingStore.open(recipe.embed.store)
    store.verify()
    for text in ("blurry", "noisy"):
        assert store.negative_prompt(text).prompts == (text,)


def test_a_job_that_lost_its_store_writes_no_manifest(
    recipe: Recipe, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders.go_on.set()

    def lost(self: lease.Ownership) -> None:
        raise lease.RunTakenError("taken")

    monkeypatch.setattr(lease.Ownership, "require", lost)
    with pytest.raises(StoreError, match="is being written by another job"):
        _embed(recipe)
    assert not storage.exists(storage.join(recipe.embed.store, "manifest.json"))


def test_shards_that_are_not_seen_from_here_leave_no_manifest(
    recipe: Recipe, encoders: Encoders, tmp_path: Path
) -> None:
    """The encoders' machine has another disk under the store's path."""
    encoders.go_on.set()
    elsewhere = str(tmp_path / "elsewhere")
    run = encoders.run

    def on_another_disk(recipe: Recipe, job: Any, *rest: Any) -> Generator[embed._Finished]:
        moved = embed._Job(elsewhere, job.inputs, job.buckets, job.shards, job.empty, None)
        yield from run(recipe, moved, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_encode", on_another_disk)
        with pytest.raises(StoreError, match="wrote shard-00000.parquet .* isn't there: put the"):
            _embed(recipe)
    assert not storage.exists(storage.join(recipe.embed.store, "manifest.json"))
    _embed(recipe)
    EmbeddingStore.open(recipe.embed.store).verify()


@pytest.mark.parametrize("content", [b"", b"[" * 10**5, b'{"\x1b[2J": 1}', b"\xff"])
def test_an_unfinished_jobs_file_that_cant_be_read_is_named(
    recipe: Recipe, encoders: Encoders, content: bytes
) -> None:
    encoders.go_on.set()
    uri = storage.join(recipe.embed.store, embed.JOB_FILE)
    storage.write_bytes(uri, content)
    with pytest.raises(StoreError, match=r"job.json.* doesn't say whose .*; delete it") as caught:
        _embed(recipe)
    assert "\x1b" not in str(caught.value)
    storage.delete_file(uri)
    _embed(recipe)


def test_a_worker_on_another_disk_says_so(store: str, tmp_path: Path) -> None:
    with one_writer(store):
        require_shared(store, PROCESS, WRITER_FILE)
        with pytest.raises(lease.RunTakenError, match="belongs to process"):
            require_shared(store, "another driver", WRITER_FILE)
    with pytest.raises(SharedDiskError, match=r"doesn't see .* a disk that all machines mount"):
        require_shared(str(tmp_path / "absent"), PROCESS, WRITER_FILE)
    (tmp_path / "prompts-1.txt").write_text("a cat")
    require_visible(str(tmp_path / "prompts-1.txt"))
    require_visible(str(tmp_path / "prompts-*.txt"))
    for name in ("absent.txt", "absent-*.txt"):
        with pytest.raises(SharedDiskError, match="doesn't see .*no such file"):
            require_visible(str(tmp_path / name))
