"""Pictures to be edited: prompts file -> sizes -> latents in the store -> stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.backbones import PixelCodec
from piflow.backbones.text import EncodedPrompt
from piflow.config import ConditionSizes, Recipe, parse_recipe
from piflow.data import embed
from piflow.data.batch import by_condition, conditioning
from piflow.data.blocks import LocalReader
from piflow.data.layout import recipe_prompts
from piflow.data.manifest import (
    MANIFEST,
    SCHEMA_VERSION_WITH_CONDITIONS,
    DamageError,
    StoreError,
    StoreManifest,
)
from piflow.data.pictures import condition_inputs, scale_picture, with_condition_sizes
from piflow.data.prompts import PictureSource, Prompt
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.storage.fingerprint import EncoderIdentity
from piflow.storage.picture import BadPictureError, size_of
from tests.unit.embedded import embed_here

IDENTITY = EncoderIdentity(name="test", weights_sha256="ab" * 32, max_tokens=3, hidden_size=4)
COUNT = 10
SIZES = [[8, 8], [8, 12]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten prompts of one size; every other one edits a lying picture, the rest standing ones."""
    rows = []
    for number in range(COUNT):
        shape = (20, 33 if number % 2 else 20, 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"prompt": f"edit {number}", "from": f"{number}.png"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe_of(folder: Path, **embed_keys: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "edits", "run_dir": str(folder / "run"),
            "model": {"family": "flux_kontext", "path": str(folder / "teacher")},
            "encoder": {"type": "bert", "path": str(folder / "encoder")},
            "embed": {
                "prompts": str(folder / "prompts.jsonl"), "condition_column": "from",
                "condition_sizes": SIZES, "store": str(folder / "store"), "height": 8, "width": 8,
                "rows_per_shard": 6, "rows_per_group": 2, "latent_dtype": "fp32", **embed_keys,
            },
        }
    )  # fmt: skip


def encode(texts: list[str]) -> Any:
    results = [EncodedPrompt(torch.full((2, 4), float(len(text))), None, False) for text in texts]
    yield list(range(len(texts))), results


@pytest.fixture
def make_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], EmbeddingStore]:
    """The embed job's own parts, less Ray."""
    monkeypatch.setattr(embed, "encoder_identity", lambda config: IDENTITY)

    return lambda recipe: embed_here(recipe, encode)


def expected_latent(folder: Path, number: int) -> torch.Tensor:
    content = (folder / f"{number}.png").read_bytes()
    picture = scale_picture(content, ConditionSizes(((8, 8), (8, 12))))
    return PixelCodec().encode(picture[None])[0]


def test_sizes_follow_from_the_ratio() -> None:
    sizes = ConditionSizes(((8, 8), (8, 12)))
    assert sizes.of(100, 100) == (8, 8) and sizes.of(100, 160) == (8, 12)
    assert sizes.of(300, 10) == (8, 8) and sizes.largest() == (8, 12)
    area = ConditionSizes(area=1024 * 1024)
    assert area.of(100, 100) == area.largest() == (1024, 1024)
    assert area.of(500, 1000) == (736, 1440) and area.instead([]) is area
    assert area.instead(SIZES).sizes == sizes.sizes
    with pytest.raises(ValueError, match="sizes or an area"):
        ConditionSizes()


def test_the_store_holds_each_prompts_picture(
    folder: Path, make_store: Callable[[Recipe], EmbeddingStore]
) -> None:
    recipe = recipe_of(folder)
    store = make_store(recipe)
    manifest = store.manifest
    assert manifest.inputs.schema_version == SCHEMA_VERSION_WITH_CONDITIONS
    assert [(b.condition_size, b.condition_shape, b.rows) for b in manifest.buckets] == [
        ((8, 8), (12, 4, 4), 5), ((8, 12), (12, 4, 6), 5)
    ]  # fmt: skip
    assert manifest.latent_bytes == 4 * 12 * 5 * (16 + 24)
    batch = store.read(range(COUNT))
    assert batch.latents is None and batch.conditions is not None
    names = store.index()["condition"].to_pylist()
    for text, name, latent in zip(batch.prompts, names, batch.conditions, strict=True):
        number = int(text.removeprefix("edit "))
        assert name == f"{number}.png" and torch.equal(latent, expected_latent(folder, number))
    assert store.empty_prompt().conditions is None
    store.verify()
    store.require_conditions(condition_inputs(recipe))
    with pytest.raises(StoreError, match="the recipe asks for none"):
        store.require_conditions(None)
    other = recipe_of(folder, condition_sizes=[[8, 8]])
    with pytest.raises(StoreError, match="scaled to nearest ratio of 8x8, 8x12, as fp32; the"):
        store.require_conditions(condition_inputs(other))
    with pytest.raises(ValueError, match=r"latents of shapes \[\(12, 4, 4\), \(12, 4, 6\)\]"):
        conditioning(batch, torch.device("cpu"))
    parts = by_condition(batch)
    assert sorted(row for rows, _ in parts for row in rows) == list(range(COUNT))
    for rows, part in parts:
        cond = conditioning(part, torch.device("cpu"))
        kept = [batch.conditions[row] for row in rows]
        assert cond.condition is not None and torch.equal(cond.condition, torch.stack(kept))
        assert part.prompts == tuple(batch.prompts[row] for row in rows)


def test_a_step_has_pictures_of_one_size_and_every_prompt_comes_once(
    folder: Path, make_store: Callable[[Recipe], EmbeddingStore]
) -> None:
    uri = make_store(recipe_of(folder)).uri
    stream = TrainStream(
        uri, seed=3, batch_size=5, micro_batch_size=5, rank=0, world_size=1, reader=LocalReader()
    )
    batches = [m for step in islice(stream.batches(), 4) for m in step.micro_batches]
    for batch in batches:
        assert batch.latents is None and batch.condition is not None
        expected = [expected_latent(folder, int(text.split()[1])) for text in batch.prompts]
        assert torch.equal(batch.condition, torch.stack(expected))
    seen = sorted(text for batch in batches[:2] for text in batch.prompts)
    assert seen == sorted(f"edit {number}" for number in range(COUNT))


def test_a_bad_picture_stops_or_leaves_its_prompt_out(
    folder: Path, make_store: Callable[[Recipe], EmbeddingStore]
) -> None:
    (folder / "3.png").write_bytes(b"<html>not found</html>")
    (folder / "4.png").unlink()
    recipe = recipe_of(folder)
    with pytest.raises(BadPictureError, match=r"'3.png' of prompt 'edit 3': a web page"):
        with_condition_sizes(recipe, recipe_prompts(recipe).prompts)
    store = make_store(recipe_of(folder, bad_pictures="skip"))
    told = {item.picture: item.reason for item in store.manifest.skipped_pictures}
    assert told.keys() == {"3.png", "4.png"} and "a web page" in told["3.png"]
    assert store.manifest.num_rows == COUNT - 2
    assert "edit 3" not in store.index()["prompt"].to_pylist()


def test_rows_without_a_picture_and_foreign_places_are_refused(folder: Path) -> None:
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": "a", "from": "0.png"}, {"prompt": "b", "from": ""}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(folder)
    with pytest.raises(BadPictureError, match="of prompt 'b': the row names no picture"):
        with_condition_sizes(recipe, recipe_prompts(recipe).prompts)
    prompts.write_text(json.dumps({"prompt": "a", "from": "../elsewhere.png"}))
    with pytest.raises(ValueError, match=r"line 1: the picture .*elsewhere.png"):
        recipe_prompts(recipe)
    prompts.write_text(json.dumps({"prompt": "a", "image": "0.png"}))
    with pytest.raises(ValueError, match="no line has from; check embed.condition_column"):
        recipe_prompts(recipe)


def test_a_prompts_id_tells_its_pictures_apart() -> None:
    one, other = PictureSource("a.png", ""), PictureSource("b.png", "")
    ids = {
        Prompt("x", 8, 8).prompt_id,
        Prompt("x", 8, 8, one).prompt_id,
        Prompt("x", 8, 8, None, one).prompt_id,
        Prompt("x", 8, 8, None, other).prompt_id,
        Prompt("x", 8, 8, one, one).prompt_id,
    }
    assert len(ids) == 5 and Prompt("x", 8, 8).prompt_id == "0692b9cdf745ff18"
    assert Prompt("x", 8, 8, None, one, (8, 8)) == Prompt("x", 8, 8, None, one)


def test_a_manifest_without_pictures_has_no_word_of_them(folder: Path, tmp_path: Path) -> None:
    tree = {
        "inputs": {
            "schema_version": 2, "encoder": IDENTITY.model_dump(), "dtype": "bf16",
            "rows_per_shard": 1, "rows_per_group": 1, "num_prompts": 1, "prompts_sha256": "cd",
        },
        "inputs_sha256": "", "shards": (), "truncated_prompts": 0,
        "buckets": ({"height": 8, "width": 8, "rows": 1},),
        "empty_prompt": {
            "path": "empty-prompt.parquet", "rows": 1, "bytes": 1, "sha256": "", "row_groups": (),
        },
    }  # fmt: skip
    text = StoreManifest.model_validate(tree).to_json()
    assert "condition" not in text and '"latent_shape": null' in text


def test_a_contradicting_manifest_is_refused(
    folder: Path, make_store: Callable[[Recipe], EmbeddingStore]
) -> None:
    store = make_store(recipe_of(folder))
    place = folder / "store" / MANIFEST
    whole = place.read_text()
    tree = json.loads(whole)
    tree["buckets"][1]["condition_shape"] = None
    place.write_text(json.dumps(tree))
    with pytest.raises(StoreError, match="bucket 1 has pictures to be edited of None"):
        EmbeddingStore.open(store.uri)
    tree = json.loads(whole)
    tree["buckets"][1]["condition_shape"] = [12, 6, 4]
    place.write_text(json.dumps(tree))
    with pytest.raises(DamageError, match=r"aren't of its bucket's shape, \[12, 6, 4\]"):
        EmbeddingStore.open(store.uri).read(range(COUNT))


def test_the_size_of_a_turned_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpeg", "png", "webp"):
        Image.new("RGB", (32, 16)).save(tmp_path / kind, kind, exif=exif)
        assert size_of((tmp_path / kind).read_bytes()) == (32, 16)
    with pytest.raises(BadPictureError, match="at most 100 in all"):
        size_of((tmp_path / "png").read_bytes(), max_pixels=100)
    with pytest.raises(BadPictureError, match="an empty file"):
        size_of(b"")
