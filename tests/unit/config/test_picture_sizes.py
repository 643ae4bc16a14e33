"""Sizes of pictures that a recipe's model doesn't take, told when the recipe is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piflow.config import RecipeError, load_recipe

RECIPE = """
name: x
run_dir: runs/x
model: {path: models/x/transformer}
encoder: {type: bert, path: encoder}
embed: {prompts: p.txt, store: store, height: 32, width: 48}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_pixels_are_whole_tokens(recipe: Path) -> None:
    load_recipe(recipe)
    with pytest.raises(RecipeError, match="embed.height and embed.width: .* multiples of 4 pixels"):
        load_recipe(recipe, ["embed.width=46"])
    with pytest.raises(RecipeError, match="embed.buckets.1: .* of 4 pixels, got 30×32 .*flux"):
        load_recipe(recipe, ["embed.buckets=[[32, 32], [30, 32]]"])
    editing = ["model.family=flux_kontext", "embed.condition_column=from"]
    load_recipe(recipe, editing)
    with pytest.raises(RecipeError, match="embed.condition_sizes.0: .* of 4 pixels, got 30×32"):
        load_recipe(recipe, [*editing, "embed.condition_sizes=[[30, 32]]"])


@pytest.mark.parametrize(
    "config", [{"block_out_channels": [8] * 4}, {"temperal_downsample": [False] * 3}]
)
def test_the_vaes_own_factor_counts(recipe: Path, tmp_path: Path, config: object) -> None:
    vae = tmp_path / "vae"
    overrides = ["model.codec=vae", f"model.vae={vae}", "embed.height=40"]
    load_recipe(recipe, overrides)  # no VAE here: who opens it will tell
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="multiples of 16 pixels, got 40×48 .*codec = vae"):
        load_recipe(recipe, overrides)
    (vae / "config.json").write_text("{}")
    load_recipe(recipe, overrides)
