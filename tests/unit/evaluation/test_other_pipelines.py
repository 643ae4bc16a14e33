"""Other people's few-step models: what they draw, and what is refused before anything is drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from piflow.config import EvaluationConfig, ModelConfig, OtherStudentConfig, Recipe
from piflow.data.reader import EmbeddingStore
from piflow.evaluation import drawing as drawing_module
from piflow.evaluation import other_pipelines
from piflow.evaluation.compare import measure
from piflow.evaluation.comparison import page, read_students
from piflow.evaluation.drawing import Drawing, Plan, methods_of
from piflow.evaluation.figures import figures_of, read_figures
from piflow.evaluation.other_pipelines import OtherSampler, open_others
from piflow.evaluation.others import Other
from piflow.sharding.single import SingleStrategy
from tests.unit.evaluation.test_compare import recipe
from tests.unit.evaluation.test_report import _parse

CPU = torch.device("cpu")
SIZE = (16, 8)
DIGESTS = ["0123456789abcdef" * 4, "fedcba9876543210" * 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from piflow.backbones.flux import FluxEncoderConfig
    from piflow.testing.models import save_model

    folder = tmp_path_factory.mktemp("pipeline")
    model = ModelConfig(path=str(folder / "transformer"), codec="vae")
    save_model(folder, model, FluxEncoderConfig(path=str(folder)), size=16)
    return folder


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel.from_pretrained(base / "transformer")
    name = "single_transformer_blocks.0.proj_out"
    weight = module.get_submodule(name).weight
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"transformer.{name}.lora_A.weight": torch.randn(2, weight.shape[1], generator=generator),
        f"transformer.{name}.lora_B.weight": 20
        * torch.randn(weight.shape[0], 2, generator=generator),
    }
    file = tmp_path_factory.mktemp("lora") / "turbo.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def store(make_flux_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    return make_flux_store([f"red {letter}" for letter in "abc"], height=16, width=8)


def other(base: Path, **changes: Any) -> OtherStudentConfig:
    values = {"name": "turbo", "base": str(base), "steps": 2, "dtype": "float32", "guidance": 1.0}
    return OtherStudentConfig(**{**values, **changes})


def opened(config: OtherStudentConfig, teacher: ModelConfig | None = None) -> Other:
    teacher = teacher or ModelConfig(path=f"{config.base}/transformer", codec="vae")
    evaluation = EvaluationConfig(others=[config], retrieval=False)
    return open_others(evaluation, teacher)[0]


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def noise_of(base: Path) -> torch.Tensor:
    channels = json.loads((base / "transformer/config.json").read_text())["in_channels"] // 4
    factor = 2 ** (
        len(json.loads((base / "vae/config.json").read_text())["block_out_channels"]) - 1
    )
    shape = (2, channels, SIZE[0] // factor, SIZE[1] // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_a_pipeline_of_the_family_starts_from_the_teachers_noise(base: Path, lora: Path) -> None:
    """What it draws is what diffusers' own call makes of these latents, with and without LoRA."""
    from diffusers import FluxPipeline

    noise = noise_of(base)
    drawn = {}
    for strength in (None, 0.5):
        chosen = {} if strength is None else {"lora": str(lora), "strength": strength}
        found = opened(other(base, **chosen))
        assert found.same_noise and Other.from_json(found.to_json()) == found
        drawn[strength] = pixels(
            OtherSampler(found, CPU).draw(["red a", "red b"], noise, DIGESTS, SIZE)
        )
        pipe = FluxPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        if strength is not None:
            pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="a")
            pipe.set_adapters(["a"], [strength])
        batch, channels, height, width = noise.shape
        expected = pipe(
            ["red a", "red b"], height=16, width=8, num_inference_steps=2, guidance_scale=1.0,
            latents=pipe._pack_latents(noise, batch, channels, height, width),
        ).images  # fmt: skip
        assert np.abs(drawn[strength] - pixels(expected)).max() <= 1
    assert (np.abs(drawn[None] - drawn[0.5]) > 2).mean() > 0.2, "the LoRA does something"
    alone = OtherSampler(opened(other(base)), CPU).draw(["red b"], noise[1:], DIGESTS[1:], SIZE)
    assert np.abs(pixels(alone) - drawn[None][1:]).max() <= 1


def test_other_noise_is_the_pictures_own(base: Path) -> None:
    """Where latents have another layout: the same for one hash, whatever else is in the batch."""
    found = opened(other(base), ModelConfig(path=str(base / "transformer")))
    assert not found.same_noise
    sampler, noise = OtherSampler(found, CPU), torch.zeros(2, 12, 8, 4)
    both = pixels(sampler.draw(["red a", "red b"], noise, DIGESTS, SIZE))
    alone = pixels(sampler.draw(["red b"], noise[1:], DIGESTS[1:], SIZE))
    assert np.abs(both[1:] - alone).max() <= 1
    swapped = pixels(sampler.draw(["red a", "red b"], noise, DIGESTS[::-1], SIZE))
    assert (both != swapped).mean() > 0.5


def test_what_decides_a_picture_is_its_identity(base: Path, lora: Path, tmp_path: Path) -> None:
    first = opened(other(base)).identity
    copied = shutil.copytree(base, tmp_path / "copy")
    assert opened(other(copied, name="called otherwise", offload=True)).identity == first
    changed = [
        other(base, steps=3),
        other(base, guidance=2.0),
        other(base, lora=str(lora)),
        other(base, lora=str(lora.parent), strength=0.5),
        other(base, scheduler_options={"shift": 2.0}),
    ]
    assert len({first, *(opened(each).identity for each in changed)}) == 6
    scheduler = copied / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 7.0}))
    assert opened(other(copied)).identity != first


def test_others_stand_beside_the_student(
    store: EmbeddingStore, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn once, compared without errors, as they start elsewhere; in figures, report and page."""
    monkeypatch.setattr(drawing_module, "sampler_of", lambda *_: lambda noise, cond: noise * 0.3)
    others = [other(base), other(base, name="turbo, 3 steps".replace(",", ""), steps=3)]
    ours = recipe(store)
    ours = ours.model_copy(
        update={"evaluation": ours.evaluation.model_copy(update={"others": others})}
    )
    found = open_others(ours.evaluation, ours.model)
    loads: list[str] = []

    class Counted(OtherSampler):
        def __init__(self, each: Other, device: torch.device) -> None:
            loads.append(each.config.name)
            super().__init__(each, device)

    monkeypatch.setattr(other_pipelines, "OtherSampler", Counted)

    def made(at: str = "c") -> Drawing:
        return Drawing(ours, Plan.of(ours, store, str(tmp_path / "pictures"), at, found), store)

    subject, strategy, done = made(), SingleStrategy(CPU), []
    assert not subject.draw_others(strategy, advance=done.append, stop=lambda: True)
    assert subject.num_missing() == subject.total - 4, "a batch of four"
    assert subject.draw_others(strategy, advance=done.append)
    assert not subject.rest_is_drawn(strategy, done.append)
    assert subject.draw(Mock(), strategy, advance=done.append) and subject.num_missing() == 0
    assert loads == ["turbo", "turbo", "turbo 3 steps"]
    assert made().draw_others(strategy) and made("another checkpoint").draw_others(strategy)
    assert made().rest_is_drawn(strategy, done.append) and len(loads) == 3
    result = measure(subject)
    names = [method.name for method in result.methods]
    assert names[2:4] == ["turbo", "turbo 3 steps"] and names[-1] == "student, 2 NFE"
    assert [method.nfe for method in result.methods[2:4]] == [2, 3]
    turbo = result.others[0]
    assert "error" not in result.columns["turbo"] and turbo.figures.keys() == {"diversity_ratio"}
    assert turbo.student_over.keys() == {"diversity_over_champion"}
    ratio = (
        result.columns[names[-1]]["diversity"].mean() / result.columns["turbo"]["diversity"].mean()
    )
    assert turbo.student_over["diversity_over_champion"].value == pytest.approx(float(ratio))
    assert [point.nfe for point in result.curve] == [2], "others are no teachers"
    _in_files(ours, result, store, tmp_path)


def _in_files(ours: Recipe, result: Any, store: EmbeddingStore, folder: Path) -> None:
    from piflow.commands.evaluate import _lineage, _write_report, summary

    (folder / "figures").mkdir()
    for name in ("a", "b"):
        made = figures_of(
            ours.model_copy(update={"name": name}), result, student="step 1", checkpoint="0" * 16,
            base=None, encoder=store.manifest.encoder,
        )  # fmt: skip
        content = made.model_dump_json().encode()
        assert read_figures(content, "it") == made and len(made.others) == 2
        (folder / "figures" / f"{name}.json").write_bytes(content)
    places = [str(folder / "figures" / f"{name}.json") for name in ("a", "b")]
    rows = _parse(page(read_students(places), "now")).tables["others"]
    assert [row[:2] for row in rows[1:]] == [["turbo", "2"], ["turbo 3 steps", "3"]], "each once"
    _write_report(ours, result, str(folder), _lineage(ours, "run", "manifest", "step 1"))
    rows = _parse((folder / "report.html").read_text()).tables["others"]
    assert rows[1][0] == "turbo" and "from other noise" in rows[1][-1]
    assert summary(result)["eval/turbo_3_steps/diversity"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "student, 4 NFE"}, "name"),
        ({"name": "Teacher"}, "isn't a name of its own"),
        ({"sigmas": [1.0]}, "sigmas has 1 noise levels for 2 steps"),
        ({"strength": 0.5}, "strength is a LoRA's"),
        ({"scheduler": "os.system"}, "scheduler"),
        ({"steps": 0}, "steps"),
    ],
)
def test_recipes_that_make_no_sense(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(others=[other(base, **changes)])


def test_two_of_one_name(base: Path) -> None:
    with pytest.raises(ValueError, match="'turbo' isn't a name of its own"):
        EvaluationConfig(others=[other(base), other(base, name="Turbo")])


def broken(base: Path, folder: Path, part: str, **changes: Any) -> Path:
    copied = shutil.copytree(base, folder / "broken")
    file = copied / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copied


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        ({"_class_name": "PiFluxPipeline"}, {}, "expected a pipeline of diffusers .*--adapter"),
        ({"_class_name": "FluxTransformer2DModel"}, {}, "expected a pipeline of diffusers"),
        ({"_class_name": ["m", "C"]}, {}, "expected one class's name"),
        ({"_class_name": "FluxImg2ImgPipeline"}, {"true_guidance": None}, ""),
        ({"_class_name": "DiTPipeline"}, {}, "DiTPipeline takes no prompt"),
        ({"unet": ["evil_module", "Unet"]}, {}, "parts of other modules are code"),
        ({}, {"scheduler": "NoSuchScheduler"}, "no scheduler NoSuchScheduler"),
        ({"_class_name": "StableDiffusion3Pipeline"}, {"true_guidance": 1.0}, "takes no true_cfg"),
    ],
)
def test_folders_that_are_refused_before_anything_is_drawn(
    index: dict[str, Any], changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    folder = broken(base, tmp_path, "model_index.json", **index)
    if not message:
        assert not opened(other(folder, **changes)).same_noise
        return
    with pytest.raises(ValueError, match=message):
        opened(other(folder, **changes))


def test_python_in_a_folder_is_refused(base: Path, tmp_path: Path) -> None:
    folder = broken(base, tmp_path, "model_index.json")
    (folder / "pipeline.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="turbo: .*holds Python code"):
        opened(other(folder))


def test_files_that_only_loading_shows_to_be_wrong(base: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.safetensors"
    save_file({"transformer.nowhere.lora_A.weight": torch.zeros(2, 4)}, nothing)
    with pytest.raises(ValueError, match="evaluation.others, turbo: "):
        OtherSampler(opened(other(base, lora=str(nothing))), CPU)
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(b"\x80\x04" * 50)
    with pytest.raises(ValueError, match="is no safetensors file"):
        OtherSampler(opened(other(base, lora=str(pickled))), CPU)
    with pytest.raises(ValueError, match="has no colour: see scheduler_options"):
        OtherSampler(opened(other(base, scheduler_options={"colour": 1})), CPU)
    config = broken(base, tmp_path, "transformer/config.json", num_layers=9)
    with pytest.raises(ValueError, match="turbo: .* lacks .* its configuration asks for"):
        OtherSampler(opened(other(config)), CPU)
    found = opened(other(base))
    with pytest.raises(ValueError, match="takes other sizes than the recipe's"):
        OtherSampler(found, CPU).draw(["red a"], noise_of(base)[:1], DIGESTS[:1], (16, 9))


def test_methods_of_others_come_before_the_students(store: EmbeddingStore, base: Path) -> None:
    found = methods_of(recipe(store), [opened(other(base))])
    assert [method.name for method in found][2:] == [
        "turbo",
        "teacher, 2 Euler steps",
        "student, 2 NFE",
    ]
