"""Qwen-Image-Edit, whose text encoder reads the picture: store, training, pipeline, sampling."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from piflow.backbones import Conditioning, build_codec
from piflow.backbones.base import pack
from piflow.backbones.encoders import build_encoder
from piflow.backbones.qwen_image_edit.tiny import small_pictures
from piflow.commands import sample, smoke
from piflow.config import ConditionSizes, Recipe, load_recipe
from piflow.data.batch import conditioning
from piflow.data.blocks import LocalReader
from piflow.data.manifest import SCHEMA_VERSION_WITH_NEGATIVES, StoreError
from piflow.data.reader import EmbeddingStore
from piflow.data.shard_checks import ContradictionError, require_rows
from piflow.data.stream import TrainStream
from piflow.inference import PiQwenImageEditPipeline
from piflow.inference.pixels import to_image
from piflow.inference.settings import SETTINGS_KEY, SamplingSettings, load_student, places_of
from piflow.roles.adapter import save_adapter
from piflow.roles.guided import GuidedTeacher
from piflow.sampling import sample_few_step
from piflow.sharding.single import SingleStrategy
from piflow.testing.shrink import shrink
from piflow.training.build import assemble, build_trio
from piflow.training.preflight import preflight
from tests.unit.embedded import embed_here

RECIPE = Path(__file__).parents[3] / "pipelines" / "recipes" / "qwen-image-edit-gm-4nfe.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With the tiny model, prompts and pictures in its folder; two pictures are square."""
    folder = tmp_path_factory.mktemp("edits")
    small = shrink(load_recipe(RECIPE), folder, gpus=0, workers=1)
    changes = {
        "model": small.model.model_copy(update={"dtype": "float32"}),
        "embed": small.embed.model_copy(update={"dtype": "bf16"}),
    }
    small = small.model_copy(update=changes)
    smoke.write_inputs(small, folder)
    for number in (8, 9):
        Image.open(folder / f"picture-{number}.png").crop((0, 0, 32, 32)).save(
            folder / f"picture-{number}.png"
        )
    return small


@pytest.fixture(scope="module")
def store(recipe: Recipe) -> EmbeddingStore:
    return embed_here(recipe)


@pytest.fixture(scope="module")
def adapter(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, trio = str(tmp_path_factory.mktemp("adapter")), build_trio(recipe)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in trio.trainable_parameters().items()
    }
    save_adapter(
        folder, trio.backbone, tensors, recipe.policy, None, base_model="edit",
        metadata={SETTINGS_KEY: SamplingSettings.of(recipe).model_dump_json()}, dtype="float32",
    )  # fmt: skip
    return folder


def picture_of(store: EmbeddingStore, recipe: Recipe, row: int) -> str:
    index = store.index().to_pylist()[row]
    return str(Path(recipe.embed.prompts).parent / index["condition"])


def test_rows_hold_the_prompt_and_the_negative_prompt_with_their_picture(
    recipe: Recipe, store: EmbeddingStore
) -> None:
    inputs = store.manifest.inputs
    assert (inputs.schema_version, inputs.negative_prompt) == (SCHEMA_VERSION_WITH_NEGATIVES, "")
    batch = store.read([0, 3])
    assert batch.negative is not None and recipe.condition_sizes is not None
    from piflow.inference.editing import Edit, edited_picture

    encoder = build_encoder(recipe.encoder)
    for number, row in enumerate((0, 3)):
        place = picture_of(store, recipe, row)
        picture = edited_picture(Edit.of("a", place), recipe.condition_sizes)
        for prompt, states, count in (
            (batch.prompts[number], batch.tokens[number], batch.num_tokens[number]),
            ("", batch.negative.tokens[number], batch.negative.num_tokens[number]),
        ):
            [expected] = encoder.encode([prompt], pictures=[lambda p=picture: p])
            assert len(expected.tokens) >= count and not states[count:].any()
            found = states[:count]
            torch.testing.assert_close(found, expected.tokens[:count], rtol=1e-2, atol=1e-2)
    assert store.empty_prompt().negative is None


def test_rows_that_contradict_themselves_are_refused(store: EmbeddingStore) -> None:
    manifest = store.manifest
    entry = manifest.shards[0]
    table = pq.ParquetFile(Path(store.uri) / entry.path).read_row_group(0)
    bucket = manifest.buckets[entry.row_groups[0].bucket]
    require_rows(table, entry, 0, manifest.inputs, bucket)
    for name in ("shared_tokens", "negative_tokens"):
        for number in (0, 60, -1):
            wrong = pa.array([number] * len(table), pa.int32())
            changed = table.set_column(table.column_names.index(name), table.field(name), wrong)
            with pytest.raises(ContradictionError, match="negative prompt doesn't lie within"):
                require_rows(changed, entry, 0, manifest.inputs, bucket)


def test_a_step_has_the_rows_negative_prompts(recipe: Recipe, store: EmbeddingStore) -> None:
    training = recipe.training.model_copy(update={"batch_size": 2})
    ours = recipe.model_copy(update={"training": training})
    assembly = assemble(ours, store, SingleStrategy(CPU), CPU)
    stream = TrainStream(
        store, seed=0, batch_size=2, micro_batch_size=2, rank=0, world_size=1, reader=LocalReader()
    )
    for batch in islice(stream.batches(), 1):
        [part] = batch.micro_batches
        assert part.negative is not None
        assert np.isfinite(assembly.trainer.step(0, assembly.bring(batch).micro_batches).loss)


def test_guidance_turns_away_from_the_rows_own(recipe: Recipe, store: EmbeddingStore) -> None:
    batch = store.read([0, 1])
    cond, empty = conditioning(batch, CPU), conditioning(store.negative_prompt(""), CPU)
    asked: list[Conditioning] = []

    class Teacher:
        def teacher_velocity(self, x: Any, sigma: Any, cond: Conditioning) -> Any:
            asked.append(cond)
            return torch.zeros_like(x)

    GuidedTeacher(Teacher(), cond, empty, recipe.guidance)(torch.zeros(2, 4, 8, 8), torch.ones(2))
    assert batch.negative is not None and cond.condition is not None
    length = batch.tokens.shape[1]
    assert torch.equal(asked[0].tokens[2:, :length], batch.negative.tokens)
    assert torch.equal(asked[0].num_tokens[2:], batch.negative.num_tokens)
    assert torch.equal(asked[0].condition, torch.cat([cond.condition] * 2))  # type: ignore[arg-type]


def test_other_stores_are_refused(recipe: Recipe, store: EmbeddingStore) -> None:
    assert preflight(recipe).store.manifest_hash == store.manifest_hash
    guidance = recipe.guidance.model_copy(update={"negative_prompt": "ugly"})
    with pytest.raises(StoreError, match="negative prompt '' with each picture.*is 'ugly'"):
        preflight(recipe.model_copy(update={"guidance": guidance}))
    with pytest.raises(ValueError, match="edits pictures, and embed.condition_column names none"):
        tree = recipe.model_dump(mode="json")
        tree["embed"] |= {"condition_column": None, "condition_sizes": []}
        Recipe.model_validate(tree)


def test_the_pipeline_edits_as_the_sampler_does(recipe: Recipe, adapter: str) -> None:
    base = Path(recipe.model.path).parent
    pipe = PiQwenImageEditPipeline.from_pretrained(base, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    levels = torch.randint(0, 256, (3, 12, 16), generator=torch.Generator().manual_seed(3))
    picture = levels / 127.5 - 1
    call = pipe.call_arguments("make it blue", 16, 16)
    with small_pictures(ConditionSizes(((12, 16),))):
        found = pipe(
            image=to_image(picture), generator=torch.Generator().manual_seed(5),
            output_type="latent", **call,
        ).images  # fmt: skip
    trio, settings = load_student(adapter, str(base), allowed=places_of(recipe))
    [item] = build_encoder(recipe.encoder).encode(["make it blue"], pictures=[lambda: picture])
    cond = Conditioning(
        item.tokens[None], torch.tensor([len(item.tokens)]),
        condition=build_codec(settings.model).encode(picture[None]),
    )  # fmt: skip
    noise = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))[:, 0]
    with torch.no_grad():
        expected = sample_few_step(
            lambda x, sigma: trio.student(x, sigma, cond), noise, settings.few_step
        )
    torch.testing.assert_close(found, pack(expected), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="image: the student edits pictures, and none was given"):
        pipe(**call)
    with pytest.raises(ValueError, match="the student has learnt its teacher's guidance"):
        pipe(image=to_image(picture), negative_prompt="", **call)


def test_sample_shows_the_encoder_the_picture(
    recipe: Recipe, store: EmbeddingStore, adapter: str, tmp_path: Path
) -> None:
    choices = sample.Choices(allowed=places_of(recipe))
    prompts, edits = sample.edits_of_file(recipe.embed.prompts, "condition")
    files = sample.main(
        adapter, [prompts[0]] * 2, edits=[edits[0], edits[3]], out=str(tmp_path), seeds=[0],
        choices=choices, show_progress=False,
    )  # fmt: skip
    one, other = (np.asarray(Image.open(file)).astype(int) for file in files[:2])
    assert np.abs(one - other).mean() > 0.1
    with pytest.raises(ValueError, match="edits pictures: name them with --edit"):
        sample.main(adapter, ["x"], out=str(tmp_path / "b"), choices=choices, show_progress=False)
