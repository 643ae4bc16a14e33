"""A family of another package works from a recipe alone, in piflow and in Ray's workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from piflow.config import find_family
from piflow.inference.settings import settings_of
from piflow.roles.adapter import load_adapter
from piflow.runs import folder as run_folder

REPOSITORY = Path(__file__).parents[2]
PLUGINS = REPOSITORY / "tests" / "plugins"


@pytest.mark.timeout(900)
def test_a_plugins_recipe_works_from_prompts_to_pictures(tmp_path: Path) -> None:
    """`piflow smoke`: embed, distil on two workers, resume, evaluate, export, load, sample."""
    files = tmp_path / "files"
    command = "from piflow.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "smoke", str(PLUGINS / "bria.yaml"), "--keep", str(files)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(PLUGINS)]),
            "HOME": str(tmp_path),
            "RAY_AUTH_MODE": "disabled",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=840,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    assert set(run_folder.checkpoints(str(files / "run"))) == {2, 3}
    adapter = load_adapter(str(files / "adapter"))
    find_family("bria_family")  # an adapter can't have it imported
    settings = settings_of(adapter, "adapter")
    assert (settings.model.family, settings.encoder.type) == ("bria_family", "bria")
    assert len(list((files / "samples").glob("*-*.png"))) == 4
    assert (files / "model" / "model_index.json").exists(), "so `load` drew by PiBriaPipeline"
