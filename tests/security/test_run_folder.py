"""What lies in a run's folder and isn't piflow's: links, other people's files, hostile records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from piflow.commands import evaluate, export, promote
from piflow.config import Recipe, parse_recipe
from piflow.runs import folder as run_folder
from piflow.runs import tracking
from piflow.runs.folder import RunDirectoryError, RunRecord
from piflow.runs.lease import OWNER_FILE, PROCESS, owned, require_owner

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


def test_the_owners_file_is_written_through_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for target in (victim, tmp_path / "absent"):
        (run_dir / OWNER_FILE).symlink_to(target)
        with pytest.raises(RunDirectoryError, match=r"driver.json is a link.*remove the link"):
            with owned(str(run_dir)):
                pass
        (run_dir / OWNER_FILE).unlink()
    assert victim.read_text() == "mine" and not (tmp_path / "absent").exists()
    with owned(str(run_dir)):
        require_owner(str(run_dir), PROCESS)


RECIPE = {
    "name": "test",
    "model": {"path": "teacher"},
    "encoder": {"path": "encoder"},
    "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
}


def recorded(run_dir: Path, changed: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe whose run was started in this folder, and the record changed."""
    recipe = parse_recipe({**RECIPE, "run_dir": str(run_dir), **sections})
    own = tracking.default_tracking_uri(recipe.run_dir)
    record = RunRecord(recipe.hash(), recipe.identity(), own, "a1b2", "manifest")
    tree = {**asdict(record), **(changed or {})}
    (run_dir / "run.json").write_text(json.dumps(tree))
    return recipe


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"base_commit": "abc1234/../../other"}, "base_commit"),
        ({"base_commit": "main"}, "base_commit"),
        ({"mlflow_run_id": "../../../other"}, "mlflow_run_id"),
        ({"mlflow_run_id": 7}, "mlflow_run_id"),
        ({"tracking_uri": ["http://host"]}, "tracking_uri"),
        ({"tracking_uri": "x" * 5000}, "tracking_uri"),
        ({"identity": []}, "identity"),
        ({"base_files": "model.safetensors"}, "base_files"),
        ({"base_files": {"a": 1}}, "base_files.a"),
        ({"manifest_hash": None}, "manifest_hash"),
        ({"more": 1}, "more"),
        ({"a\x1b[2Jb": 1}, r"a\\x1b\[2Jb"),
    ],
)
def test_every_value_of_a_runs_record_is_of_its_type(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    recipe = recorded(tmp_path)
    assert run_folder.require_run(recipe).mlflow_run_id == "a1b2"
    recorded(tmp_path, changed)
    with pytest.raises(RunDirectoryError, match=rf"run.json is damaged \({told}"):
        run_folder.require_run(recipe)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"\xff{}", b"[]", b"null", b"", b'{"recipe_hash": "a", "recipe_hash": "b"}'],
)
def test_what_is_no_record_is_named(content: bytes, tmp_path: Path) -> None:
    recipe = recorded(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"run.json.*another run_dir"):
        run_folder.require_run(recipe)


@pytest.mark.parametrize(
    "named",
    ["https://elsewhere.example:5000", "postgresql://me:hidden@elsewhere.example/mlflow",
     "sqlite:////home/me/cookies.sqlite", "s3://bucket"],
)  # fmt: skip
def test_a_folder_names_no_server_that_keys_are_sent_to(named: str, tmp_path: Path) -> None:
    """`piflow evaluate`, `export` and `promote` of somebody's run folder, which nobody trusts."""
    recipe = recorded(tmp_path, {"tracking_uri": named})
    for command in (evaluate.main, export.main, promote.main):
        with pytest.raises(ValueError, match=r"add --set tracking.uri=") as caught:
            command(recipe)
        assert "hidden" not in str(caught.value)
    ours = "http://ours.example:5000"
    trusting = recorded(tmp_path, {"tracking_uri": named}, tracking={"uri": ours})
    assert tracking.place_of(trusting, run_folder.require_run(trusting)) == ours


def test_a_folder_that_was_moved_has_its_database_with_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    recorded(old)
    (old / "mlflow.db").touch()
    old.rename(new)
    recipe = parse_recipe({**RECIPE, "run_dir": str(new)})
    assert tracking.place_of(recipe, run_folder.require_run(recipe)) == f"sqlite:///{new}/mlflow.db"
