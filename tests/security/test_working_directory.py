"""Files in the working directory are data: Ray's workers import nothing from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import sys
import ray
from piflow.config import load_recipe
from piflow.runtime.session import ray_session

def found():
    import PIL
    return PIL.__file__

with ray_session(load_recipe(sys.argv[1])):
    print("imported", ray.get(ray.remote(found).remote()))
"""


@pytest.mark.timeout(300)
def test_a_planted_module_is_not_imported(tmp_path: Path) -> None:
    """`PIL.py` beside the recipe, where a driver as the `piflow` command has it."""
    (tmp_path / "PIL.py").write_text("open('ran', 'w').close()\n")
    script = tmp_path / "bin" / "piflow"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "disabled",
    }
    environment.pop("RAY_ADDRESS", None)
    recipe = REPOSITORY / "pipelines" / "recipes" / "emoji-flux.yaml"
    done = subprocess.run(
        [sys.executable, str(script), str(recipe)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "site-packages/PIL/__init__.py" in done.stdout
    assert not list(tmp_path.rglob("ran"))
