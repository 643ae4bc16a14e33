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
    assert named
    for uri in named:
        assert storage.exists(uri), uri


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
