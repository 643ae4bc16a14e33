"""What lies in a run's folder and isn't piflow's: links, other people's files, hostile records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piflow.runs import folder as run_folder

SIZES = {"metadata.json": 3, "__0_0.distcp": 20}


def checkpoint(folder: Path, step: int = 200) -> Path:
    folder.mkdir(parents=True)
    for name, size in SIZES.items():
        (folder / name).write_bytes(b"x" * size)
    (folder / "state.json").write_text(json.dumps({"step": step, "files": SIZES}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def linked(run_dir: Path, target: Path, step: int = 200) -> Path:
    link = run_dir / "checkpoints" / run_folder.checkpoint_name(step)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


def test_a_linked_checkpoint_counts_and_is_deleted_as_a_link(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "elsewhere")
    link = linked(tmp_path / "run", target)
    before = names(target)
    assert list(run_folder.checkpoints(str(tmp_path / "run"))) == [200]
    run_folder.delete_checkpoint(str(link))
    assert not link.is_symlink() and names(target) == before


def test_retention_follows_no_link(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "elsewhere")
    run_dir = tmp_path / "run"
    linked(run_dir, target)
    checkpoint(run_dir / "checkpoints" / run_folder.checkpoint_name(300), 300)
    before = names(target)
    assert run_folder.delete_old_checkpoints(str(run_dir), keep_last=1) == [200]
    assert names(target) == before and list(run_folder.checkpoints(str(run_dir))) == [300]


def test_what_is_half_written_is_no_linked_folder(tmp_path: Path) -> None:
    target = tmp_path / "home"
    (target / "photos").mkdir(parents=True)
    for name in ("__0_0.distcp", "thesis.tex", "photos/a.png"):
        (target / name).write_text("mine")
    before = names(target)
    link = linked(tmp_path / "run", target)
    run_folder.delete_half_written(str(tmp_path / "run"))
    assert not link.is_symlink() and names(target) == before


def test_files_that_piflow_did_not_write_stay(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "run" / "checkpoints" / "step_00000200")
    (folder / "notes.txt").write_text("the good one")
    (folder / "plots").mkdir()
    (folder / "plots" / "__0_0.distcp").write_text("mine")
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    (victim / "file").write_text("mine")
    (folder / "link").symlink_to(victim)
    run_folder.delete_checkpoint(str(folder))
    assert names(folder) == ["link", "notes.txt", "plots", "plots/__0_0.distcp"]
    assert names(victim) == ["file", "sub"]
    assert run_folder.sealed_checkpoints(str(tmp_path / "run")) == {}
    assert run_folder.delete_half_written(str(tmp_path / "run")) == [200]
    assert "notes.txt" in names(folder)


def test_files_of_version_0_1_0_go(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step_00000200")
    (folder / ".metadata").write_bytes(b"x")
    (folder / ".metadata.tmp").write_bytes(b"x")
    (folder / ".state.json.0a1b2c3d.partial").write_bytes(b"x")
    run_folder.delete_checkpoint(str(folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"files": []}', '{"files": {"__0_0.distcp": "20"}}', "[" * 100_000,
     '{"files": 7}', '{"files": {"../../x": 1}}'],
)  # fmt: skip
def test_a_hostile_state_is_no_finished_checkpoint(content: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoints" / "step_00000200")
    (folder / "state.json").write_text(content)
    assert run_folder.checkpoints(str(tmp_path)) == {}


@pytest.mark.parametrize("loss", ['"low"', "[1]", "{}", "true", "NaN"])
def test_a_hostile_loss_is_none(loss: str, tmp_path: Path) -> None:
    for step in (100, 200, 300):
        checkpoint(tmp_path / "checkpoints" / run_folder.checkpoint_name(step), step)
    state = tmp_path / "checkpoints" / "step_00000100" / "state.json"
    text = json.dumps({"step": 100, "files": SIZES})
    state.write_text(text.replace('"step": 100', f'"step": 100, "loss": {loss}'))
    assert run_folder.delete_old_checkpoints(str(tmp_path), 1, keep_best=1) == [100, 200]
