"""`piflow smoke`: every shipped recipe of a distillation works from prompts to pictures.

Every test session runs one of them, Qwen-Image with a DX policy and pictures. What it leaves out is
run there by test_pipeline (FLUX.1, a GM policy, without data) and test_plugin_family (a smoke run
that is resumed). All recipes, resumed, are for `-m smoke_all`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from piflow.backbones import build_codec
from piflow.commands import smoke
from piflow.config import PiIDConfig, Recipe, differences, find_family, load_recipe, parse_recipe
from piflow.data.layout import recipe_prompts
from piflow.data.pictures import LatentEncoder
from piflow.data.reader import EmbeddingStore
from piflow.inference.editing import Edit, condition_latents
from piflow.inference.settings import SamplingSettings, encode_prompts, settings_of
from piflow.roles.adapter import load_adapter
from piflow.runs import folder as run_folder
from piflow.testing import shrink
from piflow.training.build import build_trio
from piflow.training.checkpoint import load_tensors

RECIPES = {
    path.stem: path
    for path in sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.yaml"))
    if isinstance(load_recipe(path).objective, PiIDConfig)
}
IN_EVERY_SESSION = "qwen-image-dx-4nfe"
PARTS = ["model", "embed", "distill", "resume", "evaluate", "export", "load", "sample"]
SIZES = {  # what a smoke run may change of what decides a run's results
    "model.path", "model.vae", "model.frames", "encoder.path", "encoder.max_tokens",
    "embed.prompts",
    "embed.height", "embed.width", "embed.rows_per_shard", "embed.rows_per_group",
    "embed.batch_size", "embed.condition_sizes", "lora.rank", "training.batch_size",
    "training.micro_batch_size",
    "training.optimizer.warmup_steps", "training.optimizer.decay_fraction", "training.ema.start",
    "training.steps",
}  # fmt: skip

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("name", RECIPES)
def test_only_sizes_and_places_change(name: str, tmp_path: Path) -> None:
    """Policy, objective, guidance, codec, LoRA targets and encoder are the recipe's own."""
    recipe = load_recipe(RECIPES[name])
    small = shrink.shrink(recipe, tmp_path, gpus=0)
    changed = {line.partition(":")[0] for line in differences(small.identity(), recipe.identity())}
    assert changed <= SIZES
    assert small.tracking.uri is None and not small.runtime.use_gpu
    resumed = shrink.shrink(recipe, tmp_path, gpus=8, steps=3, workers=1)
    assert resumed.hash() == small.hash() and resumed.run_dir == small.run_dir
    assert resumed.runtime.use_gpu == recipe.runtime.use_gpu


@pytest.mark.parametrize(
    ("gpus", "used", "workers"), [(0, False, 2), (1, True, 1), (2, True, 2), (64, True, 2)]
)
def test_workers_go_with_the_cluster(gpus: int, used: bool, workers: int, tmp_path: Path) -> None:
    small = shrink.shrink(load_recipe(RECIPES["flux1-dev-gm-4nfe"]), tmp_path, gpus=gpus)
    assert (small.runtime.use_gpu, small.runtime.num_workers) == (used, workers)
    assert small.embed.gpus_per_encoder == (1 if gpus else 0)


def test_columns_and_buckets_stay_in_use(tmp_path: Path) -> None:
    tree = load_recipe(RECIPES["qwen-image-gm-4nfe"]).model_dump(mode="json")
    tree["embed"] |= {
        "prompt_column": "text", "height_column": "h", "width_column": "w",
        "height": 768, "buckets": [[1024, 1024], [512, 1024]],
    }  # fmt: skip
    small = shrink.shrink(parse_recipe(tree), tmp_path, gpus=0)
    assert (small.embed.height, small.embed.width) == (12, 16)
    assert small.embed.buckets == [[16, 16], [8, 16]]
    assert (small.embed.prompt_column, small.embed.height_column) == ("text", "h")


def test_networks_of_an_evaluation_are_left_out(tmp_path: Path) -> None:
    tree = load_recipe(RECIPES["qwen-image-gm-4nfe"]).model_dump(mode="json")
    network = {"path": "s3://bucket/clip", "sha256": "ab" * 32, "licence": "MIT"}
    tree["evaluation"] |= {
        "metrics": ["clip_score"],
        "networks": {"clip": network},
        "nfe": [1, 8],
        "others": [{"name": "another", "base": "s3://bucket/another", "steps": 4}],
        "prompt_set": {"path": "s3://bucket/prompts.json"},
        "prompt_list": None,
        "retrieval": False,
    }
    tree["registry"] = {"gates": ["clip_score > 20"]}
    small = shrink.shrink(parse_recipe(tree), tmp_path, gpus=0)
    assert small.evaluation.measured == ["psnr", "diversity"] and not small.registry.gates
    assert not (small.evaluation.nfe or small.evaluation.others or small.evaluation.prompt_set)


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_model_fits_the_recipe(name: str, tmp_path: Path) -> None:
    """A fresh student agrees with its teacher on the recipe's own prompts, and starts from it."""
    small = shrink.shrink(load_recipe(RECIPES[name]), tmp_path, gpus=0)
    smoke.write_inputs(small, tmp_path)
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    assert len(set(prompts)) == 8
    settings = SamplingSettings.of(small).model_copy(update={"encoder": small.encoder.absolute()})
    cond = encode_prompts(settings, prompts[:2])
    if settings.edits is not None:
        edits = [Edit.of(name, str(tmp_path / name)) for name in ("picture-8.png", "picture-9.png")]
        latents = condition_latents(
            build_codec(small.model), settings.edits, edits, torch.device("cpu")
        )
        cond = cond.editing(torch.stack([latents[edit.sha256] for edit in edits]))
    trio = build_trio(small).train(False)
    shape = build_codec(small.model).latent_shape(small.embed.height, small.embed.width)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((2,), 0.9)
    with torch.no_grad():
        teacher = trio.teacher_velocity(x, sigma, cond)
        student = trio.student(x, sigma, cond).velocity(x, sigma)
    assert bool(torch.isfinite(teacher).all()) and float(teacher.std()) > 0.01
    assert float((student - teacher).norm() / teacher.norm()) < 0.2  # bfloat16, spread components


def test_data_dependent_recipes_get_pictures(tmp_path: Path) -> None:
    """Their latents follow from prompts.jsonl, by the tiny VAE of the family's class."""
    small = shrink.shrink(load_recipe(RECIPES["qwen-image-gm-4nfe"]), tmp_path, gpus=0)
    assert (small.objective.pictures, small.embed.image_column) == ("store", "image")
    smoke.write_inputs(small, tmp_path)
    prompts = recipe_prompts(small).prompts
    assert len({prompt.prompt_id for prompt in prompts}) == 8
    shape = build_codec(small.model).latent_shape(small.embed.height, small.embed.width)
    for latent in LatentEncoder(small.model, small.embed, "cpu").encode(prompts):
        assert isinstance(latent, torch.Tensor) and latent.shape == shape
        assert float(latent.float().std()) > 0.01


@pytest.mark.usefixtures("ray_cluster")
def test_a_recipe_works_from_prompts_to_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _works(load_recipe(RECIPES[IN_EVERY_SESSION]), tmp_path, capsys, resume=False)


@pytest.mark.smoke_all
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_resumed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _works(load_recipe(RECIPES[name]), tmp_path, capsys, resume=True)


@pytest.mark.smoke_all
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_works_from_prompts_to_pictures(
    stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two Ray Train workers, and resumed by one of another strategy."""
    changes = ["runtime.strategy=deepspeed", f"runtime.deepspeed.stage={stage}"]
    recipe = load_recipe(RECIPES["flux1-dev-gm-4nfe"], changes)
    _works(recipe, tmp_path, capsys, resume=True)
    record = run_folder.read_record(str(tmp_path / "run"))
    assert record is not None
    client = MlflowClient(tracking_uri=record.tracking_uri)
    paths = [item.path for item in client.list_artifacts(record.mlflow_run_id, "events")]
    told = [
        Path(client.download_artifacts(record.mlflow_run_id, path)).read_text() for path in paths
    ]
    base = "each worker reads its part of the base" if stage == 3 else "each worker reads all"
    assert any(f"ZeRO stage {stage}: {base}" in text for text in told), told
    assert any("single: there is one worker" in text for text in told), told


def _works(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, resume: bool
) -> None:
    results = smoke.main(recipe, keep=tmp_path, resume=resume, show_progress=False)
    assert [result.name for result in results] == [
        part for part in PARTS if resume or part != "resume"
    ]
    assert all(result.ok for result in results)
    assert recipe.name in capsys.readouterr().out
    store = EmbeddingStore.open(str(tmp_path / "store"))
    assert store.manifest.num_rows == 8
    assert (store.manifest.inputs.latents is not None) == (recipe.objective.pictures == "store")
    found = run_folder.checkpoints(str(tmp_path / "run"))
    assert set(found) == ({2, 3} if resume else {2})
    _student_has_learnt([found[step] for step in sorted(found)])
    adapter = load_adapter(str(tmp_path / "adapter"))
    assert adapter.is_full_model == (recipe.lora is None)
    assert settings_of(adapter, "adapter").few_step.nfe == recipe.objective.model_dump()["nfe"]
    suffix = "png" if find_family(recipe.model.family).video is None else "webp"
    pictures = sorted((tmp_path / "samples").glob(f"*-*.{suffix}"))
    assert len(pictures) == 4 and len({Image.open(path).tobytes() for path in pictures}) == 4


def _student_has_learnt(checkpoints: list[str]) -> None:
    """Its weights are finite, have left the average behind, and moved in a resumed step."""
    students = [load_tensors(Path(checkpoint), "trainable") for checkpoint in checkpoints]
    average = load_tensors(Path(checkpoints[-1]), "ema")
    for tensors in (*students, average):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    for one, other in pairwise([*students, average]):
        assert any(not torch.equal(one[name], other[name]) for name in other)


@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise ValueError("made to fail")

    monkeypatch.setattr("piflow.commands.embed.main", refuse)
    with pytest.raises(ValueError, match="made to fail"):
        smoke.main(load_recipe(RECIPES["imagenet-dit-gm-2nfe"]), keep=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    told = {part: line for line in lines for part in PARTS if f" {part} " in line and "│" in line}
    assert "ok" in told["model"] and "FAILED" in told["embed"]
    assert all("not run" in told[part] for part in PARTS[2:])
