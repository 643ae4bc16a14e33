"""Pictures -> latents -> store -> stream."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from piflow.backbones import PixelCodec
from piflow.backbones.text import EncodedPrompt
from piflow.config import EmbedConfig, ModelConfig
from piflow.data.blocks import LocalReader
from piflow.data.layout import ShardPlan, empty_prompt_plan, plan_store
from piflow.data.manifest import (
    SCHEMA_VERSION_WITH_LATENTS,
    Bucket,
    LatentInputs,
    RowGroup,
    ShardEntry,
    SkippedPicture,
    StoreError,
    StoreInputs,
    StoreManifest,
    write_manifest,
)
from piflow.data.pictures import (
    LatentEncoder,
    codec_identity,
    fit_picture,
    is_flipped,
    posterior_noise,
)
from piflow.data.prompts import PictureSource, Prompt, read_prompts
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.data.writer import reusable_shard, write_shard
from piflow.storage.fingerprint import CodecIdentity, EncoderIdentity
from piflow.storage.picture import BadPictureError
from piflow.testing.models import save_model

IDENTITY = EncoderIdentity(name="test", weights_sha256="ab" * 32, max_tokens=3, hidden_size=4)
PIXELS = ModelConfig(path="unused")
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def content(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def colour(picture: torch.Tensor, row: int, column: int) -> tuple[int, ...]:
    return tuple(((picture[:, row, column] + 1) * 127.5).round().int().tolist())


# ------------------------------------------------------------------------------------- one picture


def test_a_picture_of_the_right_size_is_kept_to_the_bit() -> None:
    picture = noise(8, 12)
    found = fit_picture(content(picture), 8, 12)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("height", "width"), [(16, 64), (64, 16)])
def test_the_size_is_covered_and_the_middle_is_kept(height: int, width: int) -> None:
    """Red ends are cropped away, of a picture that is four times too long."""
    picture = Image.new("RGB", (width, height), RED)
    middle = (24, 0, 40, 16) if width > height else (0, 24, 16, 40)
    picture.paste(BLUE, middle)
    found = fit_picture(content(picture), 8, 8)
    assert found.shape == (3, 8, 8)
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1)  # but for Lanczos' overshoot
    assert (found[:, 2:6, 2:6] - blue).abs().max() < 0.02


def test_exif_orientation_is_applied() -> None:
    """Orientation 6: to be turned by 90 degrees clockwise, so that the left end comes on top."""
    picture = Image.new("RGB", (32, 16), RED)
    picture.paste(BLUE, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = fit_picture(content(picture, exif=exif), 32, 16)
    assert colour(found, 2, 8) == RED and colour(found, 29, 8) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK", "1"])
def test_all_kinds_of_pictures_become_rgb_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 255, 255, 0)).convert(mode)
    kind = "tiff" if mode == "CMYK" else "png"
    assert colour(fit_picture(content(picture, kind), 8, 8), 3, 3) == WHITE


def test_transparent_parts_show_white_and_not_what_lies_below() -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert colour(fit_picture(content(picture), 8, 8), 3, 3) == WHITE


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "^an empty file; expected PNG, JPEG"),
        (
            b"<html>not found</html>",
            "^a web page; expected PNG, JPEG, WEBP, GIF, TIFF, BMP( or|, AVIF)?",
        ),
        (content(noise(32, 32))[:-700], "^not a readable image file .image file is truncated"),
        (content(noise(32, 15)), "32x15 pixels are too few for 16x16"),
    ],
)
def test_bad_pictures_say_why(damaged: bytes, message: str) -> None:
    with pytest.raises(BadPictureError, match=message):
        fit_picture(damaged, 16, 16)


def test_of_sixteen_bits_the_upper_eight_count() -> None:
    values = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    found = fit_picture(content(Image.fromarray(values)), 16, 16)
    for channel in found:
        assert torch.equal(((channel + 1) * 127.5).round(), torch.arange(256.0).view(16, 16))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_an_agreed_white_are_refused(dtype: Any) -> None:
    deep = Image.fromarray(np.linspace(0, 1000, 256).reshape(16, 16).astype(dtype))
    with pytest.raises(BadPictureError, match="more than 16 bits.*convert"):
        fit_picture(content(deep, "TIFF"), 16, 16)


# ----------------------------------------------------------------------------------- many pictures


def embed_config(folder: Path, **keys: Any) -> EmbedConfig:
    return EmbedConfig(
        prompts=str(folder / "prompts.jsonl"), store=str(folder / "store"), height=8, width=8,
        image_column="image", **keys,
    )  # fmt: skip


def on_disk(folder: Path, count: int) -> list[Prompt]:
    """Prompts of files in a folder, of alternating sizes."""
    prompts = []
    for number in range(count):
        path = folder / f"{number}.png"
        path.write_bytes(content(noise(24, 20, number)))
        source = PictureSource(path.name, str(path))
        prompts.append(Prompt(f"prompt {number}", 8, 8 if number % 2 else 12, source))
    return prompts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_latents_are_the_codecs_in_order(tmp_path: Path, dtype: str) -> None:
    prompts = on_disk(tmp_path, 40)  # more than are read ahead
    encoder = LatentEncoder(PIXELS, embed_config(tmp_path, latent_dtype=dtype), "cpu")
    for prompt, found in zip(prompts, encoder.encode(prompts), strict=True):
        assert prompt.picture is not None and isinstance(found, torch.Tensor)
        fitted = fit_picture(Path(prompt.picture.uri).read_bytes(), prompt.height, prompt.width)
        expected = PixelCodec().encode(fitted[None])[0]
        assert torch.equal(found, expected.to(found.dtype))
        assert found.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)


def _spoilt(folder: Path) -> list[Prompt]:
    """Five prompts, of which the second's, third's and fifth's pictures are no good."""
    prompts = on_disk(folder, 4)
    (folder / "1.png").write_bytes(b"nothing")
    (folder / "2.png").unlink()
    return [*prompts, Prompt("bare", 8, 8, PictureSource("", ""))]


def test_bad_pictures_stop_the_job_by_default(tmp_path: Path) -> None:
    encoder = LatentEncoder(PIXELS, embed_config(tmp_path), "cpu")
    with pytest.raises(
        BadPictureError,
        match="picture '1.png' of prompt 'prompt 1': no picture of a known.*bad_pictures = skip",
    ):
        list(encoder.encode(_spoilt(tmp_path)))


def test_bad_pictures_are_skipped_with_their_reasons(tmp_path: Path) -> None:
    encoder = LatentEncoder(PIXELS, embed_config(tmp_path, bad_pictures="skip"), "cpu")
    prompts = _spoilt(tmp_path)
    found = list(encoder.encode(prompts))
    assert [isinstance(item, SkippedPicture) for item in found] == [False, True, True, False, True]
    skipped = [item for item in found if isinstance(item, SkippedPicture)]
    assert [item.picture for item in skipped] == ["1.png", "2.png", ""]
    assert skipped[0].prompt_id == prompts[1].prompt_id
    assert "no such file" in skipped[1].reason and "names no picture" in skipped[2].reason


def test_a_storage_that_fails_is_no_bad_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an outage would silently leave out all prompts."""

    def fail(uri: str, max_bytes: int) -> bytes:
        raise OSError(f"{uri}: no answer")

    encoder = LatentEncoder(PIXELS, embed_config(tmp_path, bad_pictures="skip"), "cpu")
    prompts = on_disk(tmp_path, 2)
    monkeypatch.setattr("piflow.storage.read_bytes", fail)
    told = "picture '0.png' of prompt 'prompt 0' can't be read: .*0.png: no answer"
    with pytest.raises(OSError, match=told):
        list(encoder.encode(prompts))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nosuch://bucket/1.png", "a place of scheme 'nosuch'"),
        ("s3://bucket/1.png?bad=1", "option.s. bad; supported"),
        ("package://no.such.package/1.png", "package:// is for recipes only"),
        ("hf://owner/1.png@", "names no repository"),
    ],
)
def test_a_uri_that_means_nothing_is_no_bad_picture(tmp_path: Path, uri: str, reason: str) -> None:
    """Otherwise a mistyped column would silently leave out all prompts."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "mistyped", "image": uri}))
    with pytest.raises(ValueError, match=f"p.jsonl, line 1: .*{reason}"):
        read_prompts(str(tmp_path / "p.jsonl"), height=8, width=8, image_column="image")


def in_parquet(path: Path, values: Any) -> list[Prompt]:
    """Prompts "0", "1", … of the values of a column, two a row group."""
    texts = [str(number) for number in range(len(values))]
    pq.write_table(pa.table({"prompt": texts, "image": values}), path, row_group_size=2)
    return list(read_prompts(str(path), height=8, width=8, image_column="image").prompts)


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
def test_rows_without_a_picture_are_bad_pictures(tmp_path: Path, nothing: Any) -> None:
    picture: Any = content(noise(8, 8))
    if nothing is not None:
        picture = {"bytes": picture, "path": "x.png"}
    prompts = in_parquet(tmp_path / "p.parquet", [picture, nothing])
    encoder = LatentEncoder(PIXELS, embed_config(tmp_path, bad_pictures="skip"), "cpu")
    latent, skipped = encoder.encode(prompts)
    assert isinstance(latent, torch.Tensor)
    assert isinstance(skipped, SkippedPicture)
    assert skipped.reason == "the row names no picture"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be a path, a URI or bytes, got 3"),
        ([1, 2], "holds list"),
        ({"url": "x.png"}, "must have bytes or a path, got url"),
        ({"bytes": None, "path": 3}, "must be a path, a URI or bytes, got 3"),
    ],
)
def test_columns_of_something_else_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"p.parquet.*{message}"):
        in_parquet(tmp_path / "p.parquet", [value])


def test_a_parquet_file_that_changes_meanwhile_is_no_bad_picture(tmp_path: Path) -> None:
    """Latents are stored under the hash of the picture that was there when prompts were read."""
    path = tmp_path / "p.parquet"
    pictures: list[Any] = [content(noise(8, 8, number)) for number in range(3)]
    prompts = in_parquet(path, pictures)

    def latents() -> list[Any]:
        encoder = LatentEncoder(PIXELS, embed_config(tmp_path, bad_pictures="skip"), "cpu")
        return list(encoder.encode(prompts))

    assert all(isinstance(latent, torch.Tensor) for latent in latents())
    told = "of prompt '2' can't be read: row 3 of .*p.parquet holds another picture than when"
    for changed in ([*pictures[:2], pictures[0]], [*pictures[:2], None], pictures[:2]):
        in_parquet(path, changed)
        with pytest.raises(ValueError, match=told):
            latents()
    pq.write_table(pa.table({"prompt": ["0", "1", "2"]}), path)
    with pytest.raises(ValueError, match="of prompt '0' can't be read: row 1 of .*p.parquet holds"):
        latents()
    path.write_bytes(b"PAR1 is damaged")
    with pytest.raises(ValueError, match="of prompt '0' can't be read"):
        latents()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="of prompt '0' can't be read"):
        latents()


@pytest.mark.parametrize("wrapped", [False, True])
def test_pictures_inside_parquet(tmp_path: Path, wrapped: bool) -> None:
    """Bytes, or the datasets library's struct of bytes and path; several row groups."""
    pictures = [content(noise(8, 8, number)) for number in range(7)]
    pictures[5] = pictures[2]
    values: list[Any] = [{"bytes": item, "path": "x.png"} for item in pictures]
    table = pa.table({"prompt": ["a", "b", "a", "b", "a", "a", "a"],
                      "image": values if wrapped else pictures})  # fmt: skip
    path = tmp_path / "p.parquet"
    pq.write_table(table, path, row_group_size=2)
    found = read_prompts(str(path), height=8, width=8, image_column="image")
    assert len(found.prompts) == 6 and found.duplicates == 1
    encoder = LatentEncoder(PIXELS, embed_config(tmp_path, latent_dtype="fp32"), "cpu")
    order = [found.prompts[row] for row in (5, 0, 3, 1, 4, 2)]
    expected = [pictures[row] for row in (6, 0, 3, 1, 4, 2)]
    for latent, item in zip(encoder.encode(order), expected, strict=True):
        assert isinstance(latent, torch.Tensor)
        assert torch.equal(latent, PixelCodec().encode(fit_picture(item, 8, 8)[None])[0])


def test_a_share_of_the_pictures_is_mirrored_by_seed_and_row_alone(tmp_path: Path) -> None:
    prompts = on_disk(tmp_path, 24)

    def latents(order: range, **keys: Any) -> list[Any]:
        embed = embed_config(tmp_path, latent_dtype="fp32", **keys)
        return list(LatentEncoder(PIXELS, embed, "cpu").encode([prompts[row] for row in order]))

    plain = latents(range(24))
    half = latents(range(24), flip_probability=0.5, seed=3)
    for prompt, one, other in zip(prompts, plain, half, strict=True):
        mirrored = PixelCodec().encode(PixelCodec().decode(one[None]).flip(-1))[0]
        torch.testing.assert_close(other, mirrored if is_flipped(prompt, 3, 0.5) else one)
        assert not torch.equal(one, mirrored)
    assert latents(range(7, 9), flip_probability=0.5, seed=3)[0].equal(half[7])
    rows = [Prompt(f"{n}", 8, 8, PictureSource(f"{n}.png", "")) for n in range(4000)]
    for share in (0.0, 0.25, 1.0):
        found = sum(is_flipped(row, 0, share) for row in rows)
        assert abs(found - 4000 * share) < (120 if 0 < share < 1 else 1)  # 4 standard deviations
    other_seed = sum(is_flipped(row, 0, 0.5) == is_flipped(row, 1, 0.5) for row in rows)
    assert abs(other_seed - 2000) < 130


def _require_draws_of_rows(model: ModelConfig, folder: Path) -> None:
    """A latent is mean + std · noise, of which the noise is of seed and row, whatever the order."""
    rows = []
    for number in range(4):
        (folder / f"{number}.png").write_bytes(content(noise(16, 16, 7)))  # equal pictures
        rows.append({"prompt": f"p{number // 2}", "image": f"{number}.png"})
    path = folder / "drawn.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    prompts = list(read_prompts(str(path), height=16, width=16, image_column="image").prompts)

    def latents(order: list[int], **keys: Any) -> dict[int, torch.Tensor]:
        embed = embed_config(folder, latent_dtype="fp32", **keys)
        found = LatentEncoder(model, embed, "cpu").encode([prompts[row] for row in order])
        return {row: item for row, item in zip(order, found, strict=True)}  # type: ignore[misc]

    mean = latents([0])[0]
    drawn = latents([0, 1, 2, 3], latent_values="sample")
    again = latents([3, 1], latent_values="sample")
    other = latents([1], latent_values="sample", seed=1)
    assert torch.equal(drawn[1], again[1]) and torch.equal(drawn[3], again[3])
    different = [*drawn.values(), other[1], mean]
    for number, one in enumerate(different):
        assert not any(torch.equal(one, latent) for latent in different[number + 1 :])
    shape = tuple(mean.shape)
    draws = {row: posterior_noise(prompts[row], 0, shape) for row in (0, 1)}
    spread = [(drawn[row] - mean) / draws[row] for row in (0, 1)]  # the same posterior's
    torch.testing.assert_close(spread[0], spread[1], atol=1e-3, rtol=1e-2)
    assert (spread[0] > 0).all()


def test_the_codecs_identity_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    from piflow.config import parse_recipe

    tree = {
        "name": "x", "run_dir": "r", "encoder": {"path": "e"},
        "model": {"path": str(tmp_path / "a" / "transformer"), "codec": "vae"},
        "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 16},
    }  # fmt: skip
    model = parse_recipe(tree).model
    save_model(
        tmp_path / "a", model, parse_recipe(tree).encoder, size=16, guidance_embeds=False, seed=0
    )
    one = codec_identity(model)
    assert one.name == "AutoencoderKL, posterior mean"
    flips = embed_config(tmp_path, flip_probability=0.5, seed=3)
    suffix = ", mirrored with probability 0.5, seed 3"
    assert codec_identity(model, flips).name == one.name + suffix
    assert codec_identity(PIXELS, flips).name == codec_identity(PIXELS).name + suffix
    drawn = embed_config(tmp_path, latent_values="sample", seed=3)
    assert codec_identity(model, drawn).name == "AutoencoderKL, posterior sample, seed 3"
    _require_draws_of_rows(model, tmp_path)
    moved = model.model_copy(update={"vae": str((tmp_path / "a" / "vae").rename(tmp_path / "v"))})
    assert codec_identity(moved) == one
    weights = tmp_path / "v" / "diffusion_pytorch_model.safetensors"
    save_file({"other": torch.zeros(1)}, weights)
    assert codec_identity(moved).weights_sha256 != one.weights_sha256
    assert codec_identity(PIXELS).name.startswith("pixels")


# --------------------------------------------------------------------------------- store and stream


def _inputs(prompts: int, dtype: str = "fp32") -> StoreInputs:
    return StoreInputs(
        schema_version=SCHEMA_VERSION_WITH_LATENTS, encoder=IDENTITY, dtype="bf16",
        rows_per_shard=10, rows_per_group=4, num_prompts=prompts, prompts_sha256="cd",
        latents=LatentInputs(codec=CodecIdentity(name="c", weights_sha256="ef" * 32), dtype=dtype),
    )  # fmt: skip


def latent_of(prompt: Prompt) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(prompt.prompt_id[:8], 16))
    return torch.randn(12, prompt.height // 2, prompt.width // 2, generator=generator)


def encoded(prompt: Prompt) -> EncodedPrompt:
    latent = None if prompt.picture is None else latent_of(prompt)
    return EncodedPrompt(torch.ones(2, 4), None, False, latent)


@pytest.fixture
def make_latent_store(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """The first 14 prompts are of 8x8 pixels, the others of 8x12; prompts `bad` are left out."""

    def build(dtype: str = "fp32", bad: range = range(0)) -> EmbeddingStore:
        prompts = [
            Prompt(f"prompt {n}", 8, 8 if n < 14 else 12, PictureSource(f"{n}.png", ""))
            for n in range(25)
        ]
        inputs = _inputs(25, dtype)
        buckets, plans = plan_store(prompts, 10, 4)
        plans = [plan.without({n - 10 * i for n in bad}) for i, plan in enumerate(plans)]
        uri = str(tmp_path / dtype)
        entries = [
            write_shard(uri, plan, [encoded(prompt) for prompt in plan.prompts], inputs)[0]
            for plan in [*plans, empty_prompt_plan()]
        ]
        sized = tuple(
            b.model_copy(
                update={
                    "latent_shape": (12, b.height // 2, b.width // 2),
                    "rows": sum(
                        group.rows
                        for entry in entries[:-1]
                        for group in entry.row_groups
                        if group.bucket == number
                    ),
                }
            )
            for number, b in enumerate(buckets)
        )
        write_manifest(uri, StoreManifest(
            inputs=inputs, inputs_sha256=inputs.digest, buckets=sized, shards=tuple(entries[:-1]),
            empty_prompt=entries[-1], truncated_prompts=0,
            skipped_pictures=tuple(
                SkippedPicture(prompt_id=f"{n:016x}", picture=f"{n}.png", reason="bad") for n in bad
            ),
        ))  # fmt: skip
        return EmbeddingStore.open(uri)

    return build


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_latents_come_back_as_they_were_given(
    make_latent_store: Callable[..., EmbeddingStore], dtype: str
) -> None:
    store = make_latent_store(dtype)
    batch = store.read([24, 3, 13])
    assert batch.latents is not None
    for text, height, width, latent in zip(
        batch.prompts, batch.heights, batch.widths, batch.latents, strict=True
    ):
        number = text.removeprefix("prompt ")
        expected = latent_of(Prompt(text, height, width, PictureSource(f"{number}.png", "")))
        kept = expected if dtype == "fp32" else expected.bfloat16().float()
        assert latent.dtype == torch.float32 and torch.equal(latent, kept)
    assert store.empty_prompt().latents is None
    store.verify()
    size = 4 if dtype == "fp32" else 2
    assert store.manifest.latent_bytes == size * 12 * (14 * 16 + 11 * 24)


def test_the_stream_brings_latents_in_the_order_it_has_without_them(
    make_latent_store: Callable[..., EmbeddingStore],
) -> None:
    uri = make_latent_store().uri

    def steps(with_latents: bool, world_size: int, rank: int = 0) -> list[Any]:
        stream = TrainStream(
            uri, seed=3, batch_size=4, micro_batch_size=2, rank=rank, world_size=world_size,
            reader=LocalReader(), with_latents=with_latents,
        )  # fmt: skip
        return [m for step in islice(stream.batches(), 9) for m in step.micro_batches]

    bare, full = steps(False, 1), steps(True, 1)
    assert [m.prompt_ids for m in bare] == [m.prompt_ids for m in full]
    assert all(m.latents is None for m in bare)
    for batch in full:
        names = [text.removeprefix("prompt ") for text in batch.prompts]
        expected = [
            latent_of(Prompt(f"prompt {n}", 8, batch.width, PictureSource(f"{n}.png", "")))
            for n in names
        ]
        assert torch.equal(batch.latents, torch.stack(expected))
    shared = [m for pair in zip(steps(True, 2), steps(True, 2, 1), strict=True) for m in pair]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(full, shared, strict=True))


@pytest.mark.parametrize("bad", [range(14), range(10, 20), range(14, 25)])
def test_a_stream_over_what_bad_pictures_left(
    make_latent_store: Callable[..., EmbeddingStore], bad: range
) -> None:
    """A size or a file without any row: two epochs still bring every other prompt twice."""
    store = make_latent_store(bad=bad)
    left = store.manifest.num_rows
    assert left == 25 - len(bad)
    stream = TrainStream(
        store.uri, seed=1, batch_size=1, micro_batch_size=1, rank=0, world_size=1,
        reader=LocalReader(), with_latents=True,
    )  # fmt: skip
    batches = list(islice(stream.batches(), 2 * left))
    counts = Counter(m.prompt_ids[0] for step in batches for m in step.micro_batches)
    assert len(counts) == left and set(counts.values()) == {2}


def test_a_store_without_pictures_is_refused_where_they_are_needed(
    make_store: Callable[..., EmbeddingStore], make_latent_store: Callable[..., EmbeddingStore]
) -> None:
    plain = make_store({(8, 8): 4})
    with pytest.raises(StoreError, match="no pictures' latents.*embed.image_column"):
        TrainStream(
            plain.uri, seed=0, batch_size=2, micro_batch_size=2, rank=0, world_size=1,
            reader=LocalReader(), with_latents=True,
        )  # fmt: skip
    store = make_latent_store()
    store.require_latents(CodecIdentity(name="c", weights_sha256="ef" * 32))
    with pytest.raises(StoreError, match="made by c .weights efef.*the recipe's model has other"):
        store.require_latents(CodecIdentity(name="other", weights_sha256="ef" * 32))


def test_latents_that_are_not_finite_or_missing_are_refused(tmp_path: Path) -> None:
    _, [plan] = plan_store([Prompt("a", 8, 8, PictureSource("a.png", ""))], 10, 4)
    good = encoded(plan.prompts[0])
    bad = good._replace(latent=torch.full((12, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="the VAE gave non-finite numbers for prompt 'a'"):
        write_shard(str(tmp_path), plan, [bad], _inputs(1))
    with pytest.raises(ValueError, match="needs latents if it has a picture"):
        write_shard(str(tmp_path), plan, [good._replace(latent=None)], _inputs(1))


def test_rows_are_taken_out_of_a_plan() -> None:
    prompts = [Prompt(str(n), 8, 8) for n in range(10)]
    _, [plan] = plan_store(prompts, 10, 4)
    assert plan.without(set()) == plan
    left = plan.without({1, 4, 5, 6, 7, 9})
    assert [prompt.text for prompt in left.prompts] == ["0", "2", "3", "8"]
    assert left.row_groups == (RowGroup(rows=3, bucket=0), RowGroup(rows=1, bucket=0))
    assert plan.without(set(range(10))) == ShardPlan(plan.path, (), ())


@pytest.mark.parametrize("bad", [(1, 4), range(6)])
def test_a_shard_is_reused_with_what_it_left_out(tmp_path: Path, bad: Any) -> None:
    prompts = [Prompt(str(n), 8, 8, PictureSource(f"{n}.png", "")) for n in range(6)]
    [bucket], [plan] = plan_store(prompts, 10, 4)
    sized = (bucket.model_copy(update={"latent_shape": (12, 4, 4)}),)
    skipped = [
        SkippedPicture(prompt_id=prompts[n].prompt_id, picture=f"{n}.png", reason="bad")
        for n in bad
    ]
    left = plan.without(set(bad))
    written = write_shard(
        str(tmp_path), left, [encoded(prompt) for prompt in left.prompts], _inputs(6), skipped
    )
    assert written[1].skipped == tuple(skipped) and written[0].rows == 6 - len(bad)
    assert reusable_shard(str(tmp_path), plan, _inputs(6), sized) == written
    assert reusable_shard(str(tmp_path), left, _inputs(6), sized) == written


def test_records_without_pictures_keep_their_hashes() -> None:
    """Stores and runs from before there were latents go on."""
    inputs = StoreInputs(
        schema_version=2,
        encoder=EncoderIdentity(name="e", weights_sha256="ab", max_tokens=5, hidden_size=8),
        dtype="fp8", rows_per_shard=4, rows_per_group=2, num_prompts=1, prompts_sha256="cd",
    )  # fmt: skip
    entry = ShardEntry(
        path="p", rows=1, bytes=9, sha256="ef", row_groups=(RowGroup(rows=1, bucket=0),)
    )
    manifest = StoreManifest(
        inputs=inputs, inputs_sha256=inputs.digest, buckets=(Bucket(height=8, width=8, rows=1),),
        shards=(entry,), empty_prompt=entry, truncated_prompts=0,
    )  # fmt: skip
    assert inputs.digest.startswith("e81e76bd74ccb689")
    assert manifest.manifest_hash.startswith("c9f9027d18e438f0")
    assert manifest.times_smaller == 512 * 8 / 9
