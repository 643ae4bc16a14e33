"""What is checked of a recipe before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piflow.config import Recipe, parse_recipe
from piflow.training.preflight import _absolute, preflight


def recipe(run_dir: str, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "run_dir": run_dir,
            "model": {"path": "teacher"},
            "encoder": {"path": "package://an.encoder"},
            "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
            **sections,
        }
    )


def test_local_paths_are_made_absolute_for_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in other working directories."""
    monkeypatch.chdir(tmp_path)
    ours = _absolute(recipe("runs/x"))
    assert ours.run_dir == str(tmp_path / "runs/x")
    assert ours.embed.store == str(tmp_path / "store")
    assert ours.model.path == str(tmp_path / "teacher") and ours.model.vae is None
    other = _absolute(recipe("runs/x", model={"path": "teacher", "vae": "vae"}))
    assert other.model.vae == str(tmp_path / "vae")
    remote = recipe("s3://bucket/run", model={"path": "package://piflow.demo/teacher"})
    assert _absolute(remote).run_dir == "s3://bucket/run"
    assert _absolute(remote).model.path == "package://piflow.demo/teacher"


def test_another_familys_vae_is_refused_before_the_store_is_opened(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    config = {
        "_class_name": "AutoencoderKLQwenImage", "z_dim": 16, "temperal_downsample": [False] * 3,
        "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16,
    }  # fmt: skip
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    model = {"path": str(tmp_path / "transformer"), "codec": "vae"}
    expected = "family = flux goes with a VAE of class AutoencoderKL, .*AutoencoderKLQwenImage"
    with pytest.raises(ValueError, match=expected):
        preflight(recipe(str(tmp_path), model=model))


@pytest.mark.parametrize(
    ("family", "taken", "channels"), [("flux", 64, 16), ("flux2", 128, 32), ("sd3", 16, 16)]
)
def test_a_vae_of_other_channels_is_refused_before_the_store_is_opened(
    family: str, taken: int, channels: int, tmp_path: Path
) -> None:
    """By two config.json: the store, which comes next, isn't there."""
    for folder in ("vae", "transformer"):
        (tmp_path / folder).mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"in_channels": taken}))
    model = {"family": family, "path": str(tmp_path / "transformer"), "codec": "vae"}
    ours = recipe(str(tmp_path), model=model, encoder={"type": family, "path": "x"})
    name = {"flux2": "AutoencoderKLFlux2"}.get(family, "AutoencoderKL")
    problems = {}
    for made in (channels, 4):
        config = {"_class_name": name, "latent_channels": made, "block_out_channels": [8] * 4}
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as error:
            preflight(ours)
        problems[made] = str(error.value)
    assert "no embedding store" in problems[channels]
    assert "vae makes latents of 4 channels" in problems[4]
    assert f"transformer takes {channels} (in_channels is {taken})" in problems[4]
