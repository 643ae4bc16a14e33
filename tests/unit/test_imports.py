"""The contracts on imports hold, and are broken by what they forbid."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package in `folder`."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts, to be broken."""
    shutil.copytree(REPOSITORY / "piflow", tmp_path / "piflow")
    shutil.copy(REPOSITORY / ".importlinter", tmp_path)
    return tmp_path


def plant(file: Path, line: str) -> None:
    file.write_text(f"{file.read_text()}\n\n{line}\n")


def test_the_contracts_hold() -> None:
    done = lint(REPOSITORY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        (
            "policies/base.py",
            "import piflow.training.step  # upward",
            "piflow.policies is not allowed to import piflow.training",
        ),
        (
            "storage/uri.py",
            "def planted() -> None:\n    from piflow.config import Recipe  # upward, when called",
            "piflow.storage is not allowed to import piflow.config",
        ),
        (
            "training/step.py",
            "import ray  # not here",
            "piflow.training is not allowed to import ray",
        ),
        (
            "policies/base.py",
            "from piflow.policies import rollout  # which imports this file",
            ".rollout -> .base",
        ),
    ],
)
def test_a_planted_import_breaks_them(copy: Path, file: str, line: str, told: str) -> None:
    plant(copy / "piflow" / file, line)
    done = lint(copy)
    assert done.returncode == 1 and told in done.stdout, done.stdout


def test_a_new_folder_must_have_its_place(copy: Path) -> None:
    (copy / "piflow" / "attic").mkdir()
    (copy / "piflow" / "attic" / "__init__.py").write_text("")
    done = lint(copy)
    assert done.returncode == 1 and "attic" in done.stdout, done.stdout
