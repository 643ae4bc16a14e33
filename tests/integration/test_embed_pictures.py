"""Prompts with pictures -> latents in the store, by real Ray Data actors and a VAE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.backbones import build_codec
from piflow.commands import embed
from piflow.config import Recipe, parse_recipe
from piflow.data.manifest import StoreError, StoreManifest
from piflow.data.pictures import codec_identity, fit_picture
from piflow.data.reader import EmbeddingStore
from piflow.testing.models import save_model
from piflow.training.preflight import preflight

COUNT = 12

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("ray_cluster")]


def _recipe(folder: Path, **embed_keys: object) -> Recipe:
    return parse_recipe(
        {
            "name": "pictures-test",
            "run_dir": str(folder / "run"),
            "model": {
                "family": "dit", "codec": "vae", "path": str(folder / "model" / "transformer"),
            },
            "encoder": {"type": "class_label", "num_classes": 20},
            "embed": {
                "prompts": str(folder / "prompts.jsonl"), "image_column": "image",
                "height_column": "h", "width_column": "w", "latent_dtype": "fp32",
                "store": str(folder / "store"), "height": 16, "width": 16,
                "rows_per_shard": 5, "rows_per_group": 3, "batch_size": 2,
                **embed_keys,
            },
            "objective": {"data": "dependent", "pictures": "store"},
        }
    )  # fmt: skip


def _name(number: int) -> str:
    return f"pictures/{number}.png"


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts of two sizes with pictures, the first one also with another; their store."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for number in range(COUNT):
        pixels = random.integers(0, 256, (40, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / _name(number))
        rows.append({"prompt": str(number), "image": _name(number), "h": 16 + 8 * (number % 2),
                     "w": 16})  # fmt: skip
    rows += [{**rows[0], "image": _name(1)}, rows[3]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = _recipe(folder)
    save_model(
        folder / "model", recipe.model, recipe.encoder, size=16, guidance_embeds=False, seed=0
    )
    embed.main(recipe, show_progress=False)
    return folder


def _files(folder: Path, store: str = "store") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / store).iterdir())}


def test_latents_are_those_of_the_recipes_vae(folder: Path) -> None:
    """Each of the thirteen pairs of prompt and picture once, whatever actor made it."""
    store = preflight(_recipe(folder)).store
    assert store.manifest.num_rows == COUNT + 1 and not store.manifest.skipped_pictures
    assert [b.latent_shape for b in store.manifest.buckets] == [(4, 8, 8), (4, 12, 8)]
    batch = store.read(range(COUNT + 1))
    assert batch.latents is not None
    assert sorted(batch.prompts) == sorted([*map(str, range(COUNT)), "0"])
    codec = build_codec(_recipe(folder).model)
    names = store.index()["picture"].to_pylist()
    for name, height, width, latent in zip(
        names, batch.heights, batch.widths, batch.latents, strict=True
    ):
        picture = fit_picture((folder / name).read_bytes(), height, width)
        assert torch.equal(latent, codec.encode(picture[None])[0])


def test_a_vae_of_other_channels_is_refused_before_a_picture_is_encoded(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"in_channels": 16}')
    recipe = _recipe(folder, store=str(tmp_path / "store"))
    places = {"path": str(tmp_path), "vae": str(folder / "model" / "vae")}
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update=places)})
    with pytest.raises(ValueError, match=r"latents of 4 channels, and .* takes 16"):
        embed.main(other, show_progress=False)
    assert not (tmp_path / "store").exists()


def test_an_interrupted_job_ends_in_the_same_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(folder)
    store = folder / "store"
    manifest = StoreManifest.model_validate_json(before["manifest.json"])
    (store / "manifest.json").unlink()
    (store / "job.json").write_text(manifest.inputs.model_dump_json())
    (store / "shard-00001.parquet").unlink()
    embed.main(_recipe(folder))
    assert _files(folder) == before
    told = capsys.readouterr().err
    assert "3 of 4 files are there already" in told
    assert f"take {manifest.times_smaller:.1f} times less than padded to 512 tokens" in told
    embed.verify(_recipe(folder))
    assert "13 prompts with latents of their pictures" in capsys.readouterr().out


def test_damage_to_latents_is_found(folder: Path) -> None:
    path = folder / "store" / "shard-00001.parquet"
    whole = path.read_bytes()
    latent = EmbeddingStore.open(str(folder / "store")).read([6]).latents
    assert latent is not None
    place = whole.index(latent[0].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    try:
        with pytest.raises(StoreError, match="shard-00001.parquet.*corrupt .row group 0"):
            embed.verify(_recipe(folder))
    finally:
        path.write_bytes(whole)


def test_another_vae_or_number_format_is_refused(folder: Path) -> None:
    with pytest.raises(StoreError, match="latents: .*fp32.* there, .*bf16.* in the recipe"):
        embed.main(_recipe(folder, latent_dtype="bf16"), show_progress=False)
    other = _recipe(folder)
    pixels = other.model_copy(update={"model": other.model.model_copy(update={"codec": "pixels"})})
    with pytest.raises(StoreError, match="made by AutoencoderKL.*the recipe's model has pixels"):
        preflight(other).store.require_latents(codec_identity(pixels.model))


def _with_pictures(folder: Path, target: Path, replaced: Mapping[int, Path]) -> dict[str, Any]:
    """The thirteen prompts, those of some rows with other pictures; the recipe's places."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows = rows[: COUNT + 1]
    for number, row in enumerate(rows):
        row["image"] = str(replaced.get(number, folder / row["image"]))
    prompts = target / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "prompts": str(prompts), "store": str(target / "store"), "allow_uris": [str(folder)],
    }  # fmt: skip


def test_bad_pictures_stop_or_are_left_out_and_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was encoded before the job stopped stays and is the same as in the whole store."""
    bad = {"2": b"no picture", "7": (folder / _name(7)).read_bytes()[:300]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    places = _with_pictures(folder, tmp_path, {int(name): tmp_path / name for name in bad})
    either = (
        "of prompt '(2': no picture of a known kind|7': not a readable image file).*bad_pictures"
    )
    with pytest.raises(ValueError, match=either):
        embed.main(_recipe(folder, **places), show_progress=False)
    few = _recipe(folder, **places, bad_pictures="skip", max_bad_pictures=0.1)
    told = "2 of 13 prompts' pictures can't be used so far.*max_bad_pictures = 0.1 .*/[27]': no"
    with pytest.raises(ValueError, match=told):
        embed.main(few, show_progress=False)
    manifest = embed.main(_recipe(folder, **places, bad_pictures="skip"))
    assert "2 prompt(s) were left out for their pictures" in capsys.readouterr().err
    assert [Path(item.picture).name for item in manifest.skipped_pictures] == ["2", "7"]
    assert [bucket.rows for bucket in manifest.buckets] == [6, 5]
    store = EmbeddingStore.open(str(tmp_path / "store"))
    store.verify()
    found, whole = store.read(range(11)), EmbeddingStore.open(str(folder / "store")).read(range(13))
    assert found.latents is not None and whole.latents is not None
    expected = [x for t, x in zip(whole.prompts, whole.latents, strict=True) if t not in bad]
    assert all(torch.equal(a, b) for a, b in zip(found.latents, expected, strict=True))
    _require_stop_refuses_it_until_it_is_whole(folder, places)


def _require_stop_refuses_it_until_it_is_whole(folder: Path, places: dict[str, Any]) -> None:
    """What the error advises works, and makes nothing anew but the files that lack a prompt."""
    recipe, store = _recipe(folder, **places), Path(places["store"])
    for check in (partial(embed.main, show_progress=False), embed.verify):
        with pytest.raises(
            StoreError,
            match="lacks 2 prompt.s., the first for picture '.*/2': no picture of a known kind",
        ):
            check(recipe)
    before = {path: path.stat().st_mtime_ns for path in store.glob("*.parquet")}
    for name in ("2", "7"):
        (store.parent / name).write_bytes((folder / _name(int(name))).read_bytes())
    (store / "manifest.json").unlink()
    manifest = embed.main(recipe, show_progress=False)
    assert manifest.num_rows == COUNT + 1 and not manifest.skipped_pictures
    kept = [path.name for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert sorted(kept) == ["empty-prompt.parquet", "shard-00001.parquet"]
    embed.verify(recipe)


def test_a_store_without_a_picture_is_refused(folder: Path, tmp_path: Path) -> None:
    """A wrong place is no reason to leave everything out; put right, the same command goes on."""
    pictures = tmp_path / "pictures"
    away = {number: pictures / f"{number}.png" for number in range(COUNT + 1)}
    places = _with_pictures(folder, tmp_path, away)
    every = _recipe(folder, **places, bad_pictures="skip", max_bad_pictures=1.0)
    with pytest.raises(ValueError, match="not one of 13 pictures can be used, e.g. .*no such file"):
        embed.main(every, show_progress=False)
    assert not (tmp_path / "store" / "manifest.json").exists()
    pictures.mkdir()
    for picture in away.values():
        picture.write_bytes((folder / _name(5)).read_bytes())
    manifest = embed.main(_recipe(folder, **places, bad_pictures="skip"), show_progress=False)
    assert manifest.num_rows == COUNT + 1 and not manifest.skipped_pictures
