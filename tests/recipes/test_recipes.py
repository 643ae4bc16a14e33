"""Every shipped recipe parses, is sparse, and names only files that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from piflow import storage
from piflow.config import differences, flatten, load_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "pipelines" / "recipes").glob("**/*.yaml"))
DEFAULT = REPOSITORY / "pipelines" / "recipes" / "emoji-flux.yaml"


def test_the_default_recipe_is_there() -> None:
    assert DEFAULT in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_under_its_files_name(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_package_files_are_there(path: Path) -> None:
    named = [
        value
        for value in flatten(load_recipe(path).model_dump(mode="json")).values()
        if isinstance(value, str) and value.startswith("package://")
    ]
    for uri in named:
        assert storage.exists(uri), uri


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_one_model_share_a_store(path: Path) -> None:
    """Variants of policy and step count differ in nothing that the embeddings depend on."""
    recipe = load_recipe(path)
    for other in (load_recipe(other) for other in RECIPES):
        if other.embed.store == recipe.embed.store:
            assert other.encoder == recipe.encoder and other.embed == recipe.embed
            assert other.guidance.negative_prompt == recipe.guidance.negative_prompt


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet-dit-gm-1nfe", {"num_gaussians": 32, "nfe": 1, "f": 1, "shift": 1, "J": 2,
            "window": 0, "dropout": 0.05, "decay": 0, "cfg": 2.7, "scale": 3, "lr": 5e-5,
            "batch": 4096, "steps": 140_000, "ema": 400}),
        ("imagenet-dit-gm-2nfe", {"num_gaussians": 32, "nfe": 2, "f": 1, "shift": 1, "J": 2,
            "window": 0, "dropout": 0.05, "decay": 0, "cfg": 2.8, "scale": 3, "lr": 5e-5,
            "batch": 4096, "steps": 24_000, "ema": 400}),
        ("imagenet-dit-repa-gm-1nfe", {"num_gaussians": 32, "nfe": 1, "cfg": 3.2, "lr": 5e-5,
            "batch": 4096, "ema": 400}),
        ("flux1-dev-gm-4nfe", {"num_gaussians": 8, "nfe": 4, "f": 0.5, "shift": 3.2, "J": 4,
            "window": 3, "dropout": 0.1, "decay": 2000, "cfg": 1, "scale": 30, "lr": 1e-4,
            "batch": 256, "steps": 3000, "ema": 100}),
        ("flux1-dev-gm-4nfe-datafree", {"num_gaussians": 8, "nfe": 4, "f": 0.5, "shift": 3.2,
            "J": 4, "window": 3, "dropout": 0.1, "decay": 2000, "steps": 3000, "batch": 64}),
        ("flux1-dev-gm-8nfe", {"num_gaussians": 8, "nfe": 8, "f": 0.5, "shift": 3.2, "J": 4}),
        ("flux1-dev-dx-4nfe", {"mode": "grid", "num_points": 10, "nfe": 4, "decay": 2000}),
        ("qwen-image-gm-4nfe", {"num_gaussians": 8, "nfe": 4, "f": 0.5, "shift": 3.2, "J": 2,
            "window": 3, "dropout": 0.1, "decay": 0, "cfg": 4, "scale": 30, "lr": 1e-4,
            "batch": 256, "steps": 9000, "ema": 100}),
        ("qwen-image-gm-4nfe-datafree", {"num_gaussians": 8, "nfe": 4, "f": 0.5, "shift": 3.2,
            "J": 2, "window": 3, "dropout": 0.1, "decay": 0, "cfg": 4, "steps": 9000,
            "batch": 64}),
        ("qwen-image-dx-4nfe", {"mode": "grid", "num_points": 10, "cfg": 4, "decay": 0}),
        ("qwen-image-poly-4nfe", {"mode": "polynomial", "num_points": 10, "cfg": 4, "decay": 0}),
    ],
)  # fmt: skip
def test_published_hyper_parameters(name: str, expected: dict[str, float | str]) -> None:
    """arXiv 2510.14974, the table of hyper-parameters."""
    recipe = load_recipe(DEFAULT.with_name(f"{name}.yaml"))
    objective, training = recipe.objective, recipe.training
    assert objective.type == "pi_id"
    found: dict[str, object] = {
        "nfe": objective.nfe, "f": objective.final_step_size_scale, "shift": objective.shift,
        "J": objective.num_intermediate_states, "window": objective.window_substeps,
        "decay": objective.num_decay_iters, "scale": objective.loss_scale,
        "cfg": recipe.guidance.scale, "lr": training.optimizer.lr, "batch": training.batch_size,
        "steps": training.steps, "ema": training.ema.start,
        **recipe.policy.model_dump(),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert training.optimizer.betas == (0.9, 0.95) and training.optimizer.clip_norm == 50
    if recipe.model.family == "dit":
        widest = 0.6 if name == "imagenet-dit-gm-1nfe" else 0.7
        assert recipe.lora is None and recipe.guidance.interval == (0, widest)
        assert training.optimizer.type == "adamw8bit"
        assert (training.optimizer.warmup_steps, training.optimizer.warmup_start) == (400, 0.001)
    else:
        pictures = objective.pictures == "store"
        assert recipe.embed.latent_values == ("sample" if pictures else "mean")
        assert recipe.lora is not None and (recipe.lora.rank, recipe.lora.dropout) == (256, 0.05)
        assert recipe.lora.init == "gaussian" and training.optimizer.warmup_start == 0.001
        assert recipe.guidance.negative_prompt == "" and training.optimizer.warmup_steps == 100
    assert recipe.guidance.embedded == (3.5 if recipe.model.family == "flux" else None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_flux_and_qwen_train_on_pictures_unless_their_name_says_otherwise(path: Path) -> None:
    recipe = load_recipe(path)
    editing = recipe.embed.condition_column is not None  # data-free: nobody has the edited pictures
    if not path.stem.startswith(("flux1-dev", "qwen-image")) or editing:
        return
    assert recipe.objective.type == "pi_id"
    free = path.stem.endswith("-datafree")
    assert recipe.objective.data == ("free" if free else "dependent")
    assert recipe.objective.pictures == (None if free else "store")
    assert (recipe.embed.image_column is None) == free


@pytest.mark.parametrize("name", [
    "flux1-dev-gm-4nfe", "flux1-dev-gm-8nfe", "flux1-dev-dx-4nfe",
    "qwen-image-gm-4nfe", "qwen-image-dx-4nfe",
])  # fmt: skip
def test_datafree_variants_differ_in_nothing_but_data(name: str) -> None:
    one, other = (load_recipe(DEFAULT.with_name(f"{n}.yaml")) for n in (name, f"{name}-datafree"))
    changed = {line.partition(":")[0] for line in differences(one.deciding(), other.deciding())}
    assert changed == {
        "name", "objective.data", "objective.pictures", "embed.image_column", "embed.latent_dtype",
        "embed.latent_values",
        "training.batch_size",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_sparse_and_commented(path: Path) -> None:
    text = path.read_text()
    written = flatten(yaml.safe_load(text))
    assert len(written) < len(flatten(load_recipe(path).model_dump(mode="json"))) / 2
    assert text.count("#") >= 3


def test_both_emoji_recipes_share_one_store() -> None:
    """Otherwise one would refuse the other's: same prompts, encoder and sizes."""
    one, other = (
        load_recipe(DEFAULT.with_name(name)) for name in ("emoji-flux.yaml", "emoji-teacher.yaml")
    )
    assert one.embed.store == other.embed.store
    for section in ("embed", "encoder"):
        assert differences(one.identity()[section], other.identity()[section]) == []


def test_evaluation_prompts_are_among_the_embedded_ones() -> None:
    recipe = load_recipe(DEFAULT)
    assert recipe.evaluation.prompt_list is not None
    listed = storage.read_bytes(recipe.evaluation.prompt_list).decode().splitlines()
    embedded = set(storage.read_bytes(recipe.embed.prompts).decode().splitlines())
    assert len(listed) >= recipe.evaluation.prompts
    assert set(listed) <= embedded
