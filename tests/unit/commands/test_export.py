"""`piflow export --format`: a run's student as a whole, with how close it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from piflow.cli import app
from piflow.commands import export
from piflow.config import Recipe
from piflow.inference.settings import load_student
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunRecord
from piflow.storage import sha256
from piflow.training.preflight import base_fingerprint
from tests.unit.inference.test_settings import recipe
from tests.unit.training.test_export_whole import PACKAGES, checkpoint_of


@pytest.fixture
def run(flux_folder: Path, make_flux_store: Callable[..., Any], tmp_path: Path) -> Recipe:
    """A run with a checkpoint, a store of four prompts, and a base of its own."""
    store = make_flux_store(["a", "b", "c", "d"], 16, 16)
    base = shutil.copytree(flux_folder, tmp_path / "models/flux")
    ours = recipe(
        base,
        run_dir=str(tmp_path / "run"),
        embed={"prompts": "p.txt", "store": store.uri, "height": 16, "width": 16},
    )
    checkpoint_of(ours, Path(run_folder.checkpoint_uri(ours.run_dir, 0)))
    record = RunRecord(
        ours.hash(), ours.identity(), "sqlite:///none.db", "run-1", store.manifest_hash,
        base_fingerprint(ours),
    )  # fmt: skip
    run_folder.write_record(ours.run_dir, record)
    return ours


@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_a_runs_student_as_a_whole(
    kind: Any, run: Recipe, flux_inputs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export.whole(run, kind, dtype="bfloat16")
    assert folder == str(Path(run.run_dir) / kind)
    printed = capsys.readouterr().out
    found = re.search(r"against the bfloat16 adapter: (\S+) \(4 velocities at 16x16", printed)
    assert found, printed
    report = json.loads((Path(folder) / "export.json").read_text())
    assert report["quality"]["error"] == pytest.approx(float(found[1]), rel=0.01)
    assert 0 < report["quality"]["error"] < 0.05
    assert report["lineage"]["piflow.run_id"] == "run-1"
    for name, digest in report["files"].items():
        assert sha256(str(Path(folder) / name)) == digest
    student, _ = load_student(folder, allowed=PACKAGES)
    with torch.no_grad():
        assert student.student(*flux_inputs).velocity(*flux_inputs[:2]).isfinite().all()
    export.whole(run, kind, quality=False)
    assert "quality" not in json.loads((Path(folder) / "export.json").read_text())
    assert "velocity" not in capsys.readouterr().out


def test_unknown_formats_are_refused_when_the_command_is_read() -> None:
    done = CliRunner().invoke(app, ["export", "none.yaml", "--format", "int3"])
    assert done.exit_code == 2 and "'int3' is not one of" in done.output
