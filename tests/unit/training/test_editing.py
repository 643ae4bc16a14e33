"""A teacher that edits pictures, from a shipped recipe made small: training, drawing, sampling."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.backbones import Conditioning, build_codec
from piflow.commands import sample, smoke
from piflow.config import Recipe, load_recipe
from piflow.data.batch import conditioning
from piflow.data.blocks import LocalReader
from piflow.data.reader import EmbeddingStore
from piflow.data.stream import TrainStream
from piflow.evaluation.drawing import Drawing, Plan
from piflow.inference import PiFluxKontextPipeline
from piflow.inference.editing import Edit, condition_latents
from piflow.inference.served import ServedStudent
from piflow.inference.settings import SETTINGS_KEY, SamplingSettings, load_student, places_of
from piflow.roles.adapter import save_adapter
from piflow.roles.guided import GuidedTeacher
from piflow.sampling import sample_few_step
from piflow.sharding.single import SingleStrategy
from piflow.storage.picture import BadPictureError
from piflow.testing.shrink import shrink
from piflow.training.build import Assembly, assemble, build_trio
from piflow.training.preflight import preflight
from tests.unit.embedded import embed_here

RECIPE = Path(__file__).parents[3] / "pipelines" / "recipes" / "flux1-kontext-dev-gm-4nfe.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With the tiny model, prompts and pictures in its folder; two pictures are square."""
    folder = tmp_path_factory.mktemp("edits")
    small = shrink(load_recipe(RECIPE), folder, gpus=0, workers=1)
    small = small.model_copy(update={"model": small.model.model_copy(update={"dtype": "float32"})})
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
def trained(recipe: Recipe, store: EmbeddingStore) -> tuple[Assembly, list[float]]:
    """After two optimiser steps of two prompts each."""
    training = recipe.training.model_copy(update={"batch_size": 2})
    assembly = assemble(
        recipe.model_copy(update={"training": training}), store, SingleStrategy(CPU), CPU
    )
    stream = TrainStream(
        store, seed=0, batch_size=2, micro_batch_size=2, rank=0, world_size=1, reader=LocalReader()
    )
    losses = []
    for batch in islice(stream.batches(), 2):
        brought = assembly.bring(batch)
        losses.append(assembly.trainer.step(batch.step, brought.micro_batches).loss)
    return assembly, losses


@pytest.fixture(scope="module")
def adapter(
    recipe: Recipe, trained: tuple[Assembly, list[float]], tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = str(tmp_path_factory.mktemp("adapter"))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in trained[0].trainer.parameters.items()
    }
    save_adapter(
        folder, build_trio(recipe).backbone, tensors, recipe.policy, None, base_model="kontext",
        metadata={SETTINGS_KEY: SamplingSettings.of(recipe).model_dump_json()}, dtype="float32",
    )  # fmt: skip
    return folder


def place(recipe: Recipe, number: int) -> str:
    return str(Path(recipe.embed.prompts).parent / f"picture-{number}.png")


def test_it_trains(recipe: Recipe, trained: tuple[Assembly, list[float]]) -> None:
    assembly, losses = trained
    assert all(np.isfinite(losses)) and losses[0] != losses[1]
    fresh = build_trio(recipe).trainable_parameters()
    moved = [n for n, p in assembly.trainer.parameters.items() if not torch.equal(p, fresh[n])]
    assert len(moved) > len(fresh) / 2
    average = assembly.trainer.ema_parameters
    assert all(average[n].isfinite().all() and not average[n].requires_grad for n in average)


def test_preflight_takes_the_store_and_no_other(recipe: Recipe, store: EmbeddingStore) -> None:
    assert preflight(recipe).store.manifest_hash == store.manifest_hash
    sizes = recipe.embed.model_copy(update={"condition_sizes": [[16, 16]]})
    with pytest.raises(ValueError, match="has pictures to be edited: those of AutoencoderKL"):
        preflight(recipe.model_copy(update={"embed": sizes}))


def test_the_teachers_guidance_edits_the_same_picture(
    recipe: Recipe, store: EmbeddingStore
) -> None:
    batch = store.read([0, 1])
    cond, empty = conditioning(batch, CPU), conditioning(store.empty_prompt(), CPU)
    asked: list[Conditioning] = []

    class Teacher:
        def teacher_velocity(self, x: Any, sigma: Any, cond: Conditioning) -> Any:
            asked.append(cond)
            return torch.zeros_like(x)

    guidance = recipe.guidance.model_copy(update={"scale": 3.0})
    GuidedTeacher(Teacher(), cond, empty, guidance)(torch.zeros(2, 4, 8, 8), torch.ones(2))
    assert asked[0].condition is not None and cond.condition is not None
    assert torch.equal(asked[0].condition, torch.cat([cond.condition] * 2))


def test_operations_count_the_pictures_tokens(
    store: EmbeddingStore, trained: tuple[Assembly, list[float]]
) -> None:
    stream = TrainStream(
        store, seed=0, batch_size=2, micro_batch_size=2, rank=0, world_size=1, reader=LocalReader()
    )
    batches = [step.micro_batches[0] for step in islice(stream.batches(), 4)]
    told = {tuple(b.condition.shape[2:]): trained[0].flops(b) for b in batches if
            b.condition is not None}  # fmt: skip
    assert set(told) == {(8, 8), (6, 8)} and told[8, 8] > told[6, 8]


def test_samples_and_an_evaluation_draw_pictures_of_all_shapes(
    recipe: Recipe, store: EmbeddingStore, trained: tuple[Assembly, list[float]], tmp_path: Path
) -> None:
    samples = trained[0].draw_samples()
    assert samples.pictures.shape == (4, 4, 3, 16, 16) and samples.pictures.isfinite().all()
    evaluation = recipe.evaluation.model_copy(update={"prompts": 8, "seeds": 1, "batch_size": 3})
    ours = recipe.model_copy(update={"evaluation": evaluation})
    drawing = Drawing(ours, Plan.of(ours, store, str(tmp_path), "checkpoint"), store)
    strategy = SingleStrategy(CPU)
    assert drawing.draw(build_trio(recipe).train(False), strategy)
    drawn, pictures = drawing.read()
    student = pictures[drawing.methods[-1].name]
    assert student.shape == (8, 1, 3, 16, 16) and len(drawn) == len(drawing.methods)
    teachers = pictures[drawing.methods[-2].name]
    assert (student - teachers).abs().mean() < 0.2, "a fresh student draws as its teacher"


def test_the_pipeline_edits_as_the_sampler_does(recipe: Recipe, adapter: str) -> None:
    base = Path(recipe.model.path).parent
    pipe = PiFluxKontextPipeline.from_pretrained(base, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    levels = torch.randint(0, 256, (1, 3, 12, 16), generator=torch.Generator().manual_seed(3))
    arguments = pipe.call_arguments("make it blue", 16, 16)
    call = {**arguments, "max_sequence_length": recipe.encoder.text_tokens, "_auto_resize": False}
    found = pipe(
        image=levels / 255, generator=torch.Generator().manual_seed(5), output_type="latent", **call
    ).images
    trio, settings = load_student(adapter, str(base), allowed=places_of(recipe))
    tokens, pooled, _ = pipe.encode_prompt(
        "make it blue", None, max_sequence_length=recipe.encoder.text_tokens
    )
    shown = build_codec(settings.model).encode(levels / 127.5 - 1)
    cond = Conditioning(tokens, torch.full((1,), tokens.shape[1]), pooled, condition=shown)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = sample_few_step(
            lambda x, sigma: trio.student(x, sigma, cond), noise, settings.few_step
        )
    from piflow.backbones.base import pack

    torch.testing.assert_close(found, pack(expected), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="image: the student edits pictures, and none was given"):
        pipe(**call)
    with pytest.raises(ValueError, match="the student has learnt its teacher's guidance"):
        pipe(image=levels / 255, true_cfg_scale=2.0, negative_prompt="", **call)


def test_sample_edits_the_picture_that_it_is_given(
    recipe: Recipe, adapter: str, tmp_path: Path
) -> None:
    choices = sample.Choices(allowed=places_of(recipe))

    def draw(out: str, prompts: list[str], edits: list[Edit]) -> list[np.ndarray]:
        files = sample.main(
            adapter, prompts, edits=edits, out=str(tmp_path / out), seeds=[0], choices=choices,
            show_progress=False,
        )  # fmt: skip
        return [np.asarray(Image.open(file)).astype(int) for file in files[:-1]]

    square, lying = place(recipe, 8), place(recipe, 10)
    one, other = draw("a", ["x", "x"], sample.named_edits([square, lying]))
    [again] = draw("b", ["x"], sample.named_edits([lying]))
    assert np.abs(one - other).mean() > 0.1 and np.abs(again - other).mean() < 0.01
    prompts, edits = sample.edits_of_file(recipe.embed.prompts, "condition")
    assert len(prompts) == len(edits) == 8 and edits[0].sha256 == Edit.of("a", square).sha256
    with pytest.raises(ValueError, match="edits pictures: name them with --edit"):
        draw("c", ["x"], [])
    with pytest.raises(ValueError, match="one for each, got 2 for 3 prompts"):
        draw("c", ["x", "y", "z"], edits[:2])
    with pytest.raises(BadPictureError, match="'no.png' to be edited can't be read"):
        Edit.of("no.png", str(tmp_path / "no.png"))
    with pytest.raises(ValueError, match="edits pictures, and this model takes prompts alone"):
        ServedStudent(adapter, allowed=places_of(recipe))


def test_a_picture_that_changes_meanwhile_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(Path(place(recipe, 8)).read_bytes())
    edit = Edit.of("a", str(file))
    file.write_bytes(Path(place(recipe, 10)).read_bytes())
    sizes = recipe.condition_sizes
    assert sizes is not None
    with pytest.raises(BadPictureError, match="has changed since the command began"):
        condition_latents(build_codec(recipe.model), sizes, [edit], CPU)
