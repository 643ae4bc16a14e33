"""Recipes of families that make videos."""

from __future__ import annotations

from typing import Any

import pytest

from piflow.config import ModelConfig, Recipe, RecipeError, find_family, parse_recipe


def recipe(family: str = "wan", **sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "test",
        "run_dir": "run",
        "model": {"path": "teacher", "family": family, "codec": "vae"},
        "encoder": {"type": family, "path": "encoder"},
        "embed": {"prompts": "p.txt", "store": "store", "height": 32, "width": 32},
        "evaluation": {"retrieval": False},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_recipe(tree)


@pytest.mark.parametrize(("frames", "latents"), [(None, 21), (81, 21), (1, 1), (5, 2)])
def test_frames_of_latents(frames: int | None, latents: int) -> None:
    assert recipe(model={"frames": frames}).model.latent_frames == latents


def test_pixels_have_one_frame_each() -> None:
    assert recipe(model={"frames": 6, "codec": "pixels"}).model.latent_frames == 6
    assert ModelConfig(family="flux", path="x").latent_frames == 1


@pytest.mark.parametrize(
    ("family", "sections", "message"),
    [
        ("wan", {"model": {"frames": 80}}, r"multiple of 4 more, got 80; use 77 or 81"),
        ("flux", {"model": {"frames": 81}}, "frames = 81 is about videos, and family = flux makes"),
        ("wan", {"embed": {"image_column": "video"}}, "videos in the store aren't supported"),
        ("wan", {"objective": {"type": "flow_matching"}}, "videos in the store aren't supported"),
        ("wan", {"objective": {"data": "dependent", "pictures": "emoji"}}, "a data-free recipe"),
        ("wan", {"embed": {"condition_column": "video"}}, "leave it out, or use a family that"),
        ("wan", {"evaluation": {"retrieval": True}}, "evaluation.retrieval is about pictures"),
        ("wan", {"evaluation": {"others": [{"name": "a", "base": "b", "steps": 4}]}},
            "evaluation.others is about pictures"),
    ],
)  # fmt: skip
def test_what_is_refused(family: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(family, **sections)


def test_the_length_decides_the_run() -> None:
    usual, same, shorter = (recipe(model={"frames": n}) for n in (None, None, 5))
    assert usual.hash() == same.hash() != shorter.hash()
    assert find_family("wan").video is not None
