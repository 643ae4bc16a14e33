"""What the driver says of workers that failed, and what it checks before it starts any."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from piflow.config import Recipe, parse_recipe
from piflow.runs.tracking import Tracker
from piflow.runtime import driver
from piflow.runtime.mailbox import StopReason
from piflow.runtime.ray_private import first_failure
from piflow.training import preflight


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


class Remote(Exception):
    """An error as Ray Train hands it over: its text is the remote traceback."""


TRACEBACK = """Traceback (most recent call last):
  File "/site-packages/ray/train/worker.py", line 1, in run
    train_fn()
  File "/piflow/data/store.py", line 9, in read
    raise StoreError(message)
piflow.data.manifest.StoreError: shard-00000.parquet is corrupt;
delete it
"""


def test_the_lowest_ranks_message_comes_without_its_traceback() -> None:
    failures = {1: Remote("second"), 0: Remote(TRACEBACK)}
    assert first_failure(failures) == (
        "worker 0 failed: piflow.data.manifest.StoreError: shard-00000.parquet is corrupt;\n"
        "delete it"
    )


def test_a_failure_without_traceback_is_told_whole() -> None:
    assert first_failure({3: Remote("the actor died")}) == "worker 3 failed: the actor died"
    assert first_failure({}) == "the workers failed"


def test_local_paths_are_made_absolute_for_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in other working directories."""
    monkeypatch.chdir(tmp_path)
    ours = preflight.absolute_recipe(recipe("runs/x"))
    assert ours.run_dir == str(tmp_path / "runs/x")
    assert ours.embed.store == str(tmp_path / "store")
    assert ours.model.path == str(tmp_path / "teacher") and ours.model.vae is None
    other = preflight.absolute_recipe(recipe("runs/x", model={"path": "teacher", "vae": "vae"}))
    assert other.model.vae == str(tmp_path / "vae")
    remote = recipe("s3://bucket/run", model={"path": "package://piflow.demo/teacher"})
    assert preflight.absolute_recipe(remote).run_dir == "s3://bucket/run"
    assert preflight.absolute_recipe(remote).model.path == "package://piflow.demo/teacher"


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
        preflight.check_store(recipe(str(tmp_path), model=model))


@pytest.mark.parametrize(("max_failures", "attempts"), [(0, 1), (2, 3), (-1, 4)])
def test_attempts_that_ray_train_gives_up_are_made_again(
    max_failures: int, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told; the fourth attempt gets through."""
    made = 0

    def attempt(*_: object) -> StopReason:
        nonlocal made
        made += 1
        if made < 4:
            raise driver.ControllerFailedError(f"number {made}")
        return StopReason.NONE

    ours = recipe("run", runtime={"max_failures": max_failures})
    monkeypatch.setattr(driver, "_attempt", attempt)
    tracker = Mock(spec=Tracker)
    refusal = pytest.raises(driver.WorkersFailedError, match=f"number {attempts}")
    with refusal if attempts < 4 else nullcontext():
        driver._attempts(ours, Mock(), Mock(), Mock(), tracker)
    assert made == attempts
    told = [call.args for call in tracker.event.call_args_list]
    assert told == [
        ("controller-failed", f"number {number}") for number in range(1, min(attempts, 3) + 1)
    ]


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
            preflight.check_store(ours)
        problems[made] = str(error.value)
    assert "no embedding store" in problems[channels]
    assert "vae makes latents of 4 channels" in problems[4]
    assert f"transformer takes {channels} (in_channels is {taken})" in problems[4]
