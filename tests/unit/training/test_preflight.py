"""What is checked of a recipe before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from piflow.config import Recipe, parse_recipe
from piflow.training.preflight import _absolute, _retrieval, preflight


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
    ours = _absolute(recipe("runs/x"), None)
    assert ours.run_dir == str(tmp_path / "runs/x")
    assert ours.embed.store == str(tmp_path / "store")
    assert ours.model.path == str(tmp_path / "teacher") and ours.model.vae is None
    other = _absolute(recipe("runs/x", model={"path": "teacher", "vae": "vae"}), None)
    assert other.model.vae == str(tmp_path / "vae")
    remote = recipe("s3://bucket/run", model={"path": "package://piflow.demo/teacher"})
    assert _absolute(remote, None).run_dir == "s3://bucket/run"
    assert _absolute(remote, None).model.path == "package://piflow.demo/teacher"


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


class _Index:
    """A store of which only the index is asked for."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts

    def index(self) -> pa.Table:
        ids = [f"{number:016x}" for number in range(len(self._prompts))]
        rows = list(range(len(ids)))
        return pa.table({"row": rows, "prompt_id": ids, "prompt": self._prompts})


def test_own_prompts_are_refused_where_retrieval_is_measured(tmp_path: Path) -> None:
    """Which is the default, and was said only after every picture had been drawn."""
    store: Any = _Index(["red heart", "a prompt of mine"])
    ours = recipe(str(tmp_path), evaluation={"prompts": 2})
    with pytest.raises(ValueError, match="got 'a prompt of mine'; set evaluation.retrieval=false"):
        _retrieval(ours, store)
    assert _retrieval(recipe("r", evaluation={"prompts": 2, "retrieval": False}), store) is None
    assert _retrieval(recipe("r", evaluation={"prompts": 1}), store) is not None
    (tmp_path / "list.txt").write_text("red heart\n\na prompt of mine \n")
    listed = {"prompts": 2, "prompt_list": str(tmp_path / "list.txt")}
    with pytest.raises(ValueError, match="got 'a prompt of mine'"):
        _retrieval(recipe("r", evaluation=listed), store)
    (tmp_path / "list.txt").write_bytes("red heart\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="list.txt, line 1: not UTF-8"):
        _retrieval(recipe("r", evaluation=listed), store)
    with pytest.raises(ValueError, match="asks for 3 prompts"):
        _retrieval(recipe("r", evaluation={"prompts": 3, "retrieval": False}), store)
