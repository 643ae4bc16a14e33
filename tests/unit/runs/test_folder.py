"""The run's folder: whose it is, which checkpoints count, and why it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piflow.config import Recipe, parse_recipe
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunDirectoryError, RunRecord
from piflow.training.checkpoint import STATE_FILE, FileRecord, RunState, state_file
from piflow.training.preflight import require_newest_of
from tests.object_store import serve_objects


def recipe(run_dir: Path, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "run_dir": str(run_dir),
            "model": {"path": "teacher"},
            "encoder": {"path": "encoder"},
            "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
            **sections,
        }
    )


def start(recipe: Recipe) -> RunRecord:
    record = RunRecord(
        recipe.hash(), recipe.identity(), "sqlite:///mlflow.db", "run-id", "manifest"
    )
    run_folder.write_record(recipe.run_dir, record)
    return record


def checkpoint(run_dir: Path, step: int) -> Path:
    """A finished one of two workers, as far as its files are concerned."""
    folder = run_dir / "checkpoints" / run_folder.checkpoint_name(step)
    folder.mkdir(parents=True)
    sizes = {".metadata": 3, "__0_0.distcp": 20, "__1_0.distcp": 10}
    for name, size in sizes.items():
        (folder / name).write_bytes(b"x" * size)
    (folder / "state.json").write_text(json.dumps({"step": step, "files": sizes}))
    return folder


def test_a_new_folder_has_no_record(tmp_path: Path) -> None:
    assert run_folder.read_record(str(tmp_path / "run")) is None
    assert run_folder.require_same_recipe(recipe(tmp_path)) is None
    with pytest.raises(RunDirectoryError, match="no run in .*; start it with `piflow distill`"):
        run_folder.require_run(recipe(tmp_path))


def test_record_round_trip(tmp_path: Path) -> None:
    ours = recipe(tmp_path / "run")
    record = start(ours)
    assert run_folder.read_record(ours.run_dir) == record
    assert run_folder.require_run(ours) == record


def test_the_same_recipe_may_run_longer_elsewhere_and_wider(tmp_path: Path) -> None:
    record = start(recipe(tmp_path, training={"steps": 5}))
    longer = recipe(tmp_path, training={"steps": 50}, runtime={"num_workers": 2})
    assert run_folder.require_same_recipe(longer) == record


def test_another_store_is_refused(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    record = RunRecord(ours.hash(), ours.identity(), "sqlite:///mlflow.db", "run-id", "manifest-a")
    run_folder.require_same_store(ours, None, "manifest-b")
    run_folder.require_same_store(ours, record, "manifest-a")
    with pytest.raises(RunDirectoryError, match="started on store manifest-a.*is manifest-b"):
        run_folder.require_same_store(ours, record, "manifest-b")


def test_other_base_weights_are_refused(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    known = replace(start(ours), base_sha256="weights-a")
    run_folder.write_record(ours.run_dir, known)
    assert run_folder.read_record(ours.run_dir) == known
    for record, found in ((None, "x"), (known, "weights-a"), (known, None)):
        run_folder.require_same_base(ours, record, found)
    with pytest.raises(RunDirectoryError, match="weights-a, those in teacher are weights-b now"):
        run_folder.require_same_base(ours, known, "weights-b")


def test_a_record_without_base_weights_stays_readable(tmp_path: Path) -> None:
    """As version 0.1.0 wrote them."""
    ours = recipe(tmp_path)
    start(ours)
    path = tmp_path / "run.json"
    tree = json.loads(path.read_text())
    del tree["base_sha256"]
    path.write_text(json.dumps(tree))
    record = run_folder.require_run(ours)
    assert record.base_sha256 is None
    run_folder.require_same_base(ours, record, "weights")


def test_some_bytes_of_the_base_were_changed(tmp_path: Path) -> None:
    """Where whole hashes are known; copies in files of other names are compared by samples."""
    ours = recipe(tmp_path)
    record = replace(start(ours), base_files={"a.safetensors": "1" * 64, "b": "2" * 64})
    run_folder.write_record(ours.run_dir, record)
    assert run_folder.require_run(ours) == record
    for fine in (None, record.base_files, {"a.safetensors": "1" * 64}, {"other": "3" * 64}):
        run_folder.require_same_base(ours, record, record.base_sha256, fine)
    with pytest.raises(RunDirectoryError, match="another b .sha256 2222222222222222, now 444"):
        run_folder.require_same_base(ours, record, record.base_sha256, {"b": "4" * 64})


def test_a_moved_store_is_still_the_same_run(tmp_path: Path) -> None:
    record = start(recipe(tmp_path))
    embed = {"prompts": "prompts.txt", "store": "/moved/store", "height": 32, "width": 32}
    assert run_folder.require_run(recipe(tmp_path, embed=embed)) == record


def test_another_recipes_folder_names_the_keys_that_differ(tmp_path: Path) -> None:
    start(recipe(tmp_path))
    changed = recipe(tmp_path, seed=3, training={"optimizer": {"lr": 2e-4}})
    with pytest.raises(RunDirectoryError) as caught:
        run_folder.require_run(changed)
    message = str(caught.value)
    assert f"{tmp_path} belongs to another recipe" in message
    assert "seed: 3 here, 0 there" in message
    assert "training.optimizer.lr: 0.0002 here, 0.0001 there" in message
    assert "set another run_dir" in message
    assert message.count("there") == 2


@pytest.mark.parametrize("content", ['{"recipe_hash": "ab', "{}", "[]"])
def test_a_damaged_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunDirectoryError, match="run.json is damaged.*another run_dir"):
        run_folder.require_same_recipe(recipe(tmp_path))


def test_only_finished_checkpoints_count(tmp_path: Path) -> None:
    """Workers' files arrive one by one: none may be missing or short."""
    first, second = checkpoint(tmp_path, 200), checkpoint(tmp_path, 1000)
    for step, name in enumerate(("state.json", ".metadata", "__0_0.distcp", "__1_0.distcp"), 1200):
        (checkpoint(tmp_path, step) / name).unlink()
    (checkpoint(tmp_path, 1300) / "__1_0.distcp").write_bytes(b"xxx")
    for step, content in enumerate(('{"step": 1400, "fi', "{}", "[]"), 1400):
        (checkpoint(tmp_path, step) / "state.json").write_text(content)
    found = run_folder.checkpoints(str(tmp_path))
    assert found == {200: str(first), 1000: str(second)}
    assert list(found) == [200, 1000]
    assert run_folder.newest_checkpoint(str(tmp_path)) == str(second)


def test_a_run_on_an_object_store_is_known_by_its_states_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run's weights may be larger than this machine's disk."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours = recipe(tmp_path)
    for step in (100, 200):
        folder = checkpoint(tmp_path, step)
        (folder / STATE_FILE).unlink()
        state = RunState(
            step, step, ours.hash(), "run", {}, identity=ours.identity(), manifest_hash="manifest"
        )
        written = {file.name: file.read_bytes() for file in folder.iterdir()}
        records = {
            name: FileRecord(len(content), hashlib.sha256(content).hexdigest())
            for name, content in written.items()
        }
        (folder / STATE_FILE).write_bytes(state_file(state, records))
    files = {
        f"run/{file.relative_to(tmp_path)}": file.read_bytes()
        for file in tmp_path.rglob("*") if file.is_file()
    }  # fmt: skip
    with serve_objects(files) as store:
        found = run_folder.checkpoints(store.uri("bucket/run"))
        require_newest_of(ours, "manifest", found)
        with pytest.raises(ValueError, match="was trained on store"):
            require_newest_of(ours, "another", found)
        read = {request.split("?")[0].rsplit("/", 1)[-1] for request in store.requests}
    assert list(found) == [100, 200]
    assert "state.json" in read and not [name for name in read if name.endswith(".distcp")]
    assert not (tmp_path / "cache").exists()


def test_half_written_folders_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    """A folder with `state.json` was whole once: somebody may want to see what is wrong with it."""
    checkpoint(tmp_path, 200)
    (checkpoint(tmp_path, 400) / "__1_0.distcp").unlink()
    for step in (300, 500):
        (checkpoint(tmp_path, step) / "state.json").unlink()
    notes = tmp_path / "checkpoints" / "step_of_mine"
    notes.mkdir()
    (notes / "note.txt").write_text("mine")
    assert list(run_folder.sealed_checkpoints(str(tmp_path))) == [200, 400]
    assert run_folder.delete_half_written(str(tmp_path)) == [300, 500]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000200", "step_00000400", "step_of_mine"]
    assert run_folder.delete_half_written(str(tmp_path / "new")) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [7]), (3, None, [5, 6, 7]), (9, None, [1, 2, 3, 4, 5, 6, 7]), (2, 4, [4, 6, 7])],
)
def test_retention(keep_last: int, keep_every: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint(tmp_path, step)
    (checkpoint(tmp_path, 8) / "state.json").unlink()  # doesn't count as one of the newest
    deleted = run_folder.delete_old_checkpoints(str(tmp_path), keep_last, keep_every)
    assert list(run_folder.checkpoints(str(tmp_path))) == kept
    assert sorted(kept + deleted) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "keep_best", "kept"),
    [
        (1, None, 1, [3, 7]),
        (2, None, 2, [3, 5, 6, 7]),
        (1, None, 3, [2, 3, 5, 7]),  # of equal ones the earlier
        (1, 4, 1, [3, 4, 7]),
        (1, None, 9, [2, 3, 5, 6, 7]),
    ],
)
def test_the_best_are_kept_as_well(
    keep_last: int, keep_every: int | None, keep_best: int, kept: list[int], tmp_path: Path
) -> None:
    """Some know no loss: those of before there was one, and those of skipped steps only."""
    losses = {2: 0.5, 3: 0.1, 5: 0.2, 6: 0.5, 7: 9.0}
    for step in range(1, 8):
        file = checkpoint(tmp_path, step) / "state.json"
        known = {"loss": losses.get(step)} if step > 1 else {}
        file.write_text(json.dumps(json.loads(file.read_text()) | known))
    run_folder.delete_old_checkpoints(str(tmp_path), keep_last, keep_every, keep_best)
    assert list(run_folder.checkpoints(str(tmp_path))) == kept


def test_a_deletion_that_is_killed_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, 200)

    def killed(uri: str) -> None:
        raise OSError("killed")

    monkeypatch.setattr(run_folder.storage, "delete_folder", killed)
    with pytest.raises(OSError, match="killed"):
        run_folder.delete_checkpoint(str(folder))
    assert folder.is_dir() and run_folder.sealed_checkpoints(str(tmp_path)) == {}
    monkeypatch.undo()
    run_folder.delete_checkpoint(str(folder))
    assert not folder.exists()
    run_folder.delete_checkpoint(str(folder))


def test_a_checkpoints_place_is_where_it_is_found(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 200)
    assert run_folder.checkpoint_uri(str(tmp_path), 200) == str(folder)
    assert run_folder.checkpoint_uri("s3://bucket/run?scheme=http", 200) == (
        "s3://bucket/run/checkpoints/step_00000200?scheme=http"
    )


def test_other_files_beside_checkpoints_are_no_checkpoints(tmp_path: Path) -> None:
    copy = checkpoint(tmp_path, 200)
    shutil.copytree(copy, copy.with_name("step_of_mine"))
    shutil.copytree(copy, copy.with_name("notes"))
    (copy.parent / "checkpoint_manager_snapshot.json").write_text("{}")
    (copy.parent / "step_7").write_text("a file")
    assert list(run_folder.checkpoints(str(tmp_path))) == [200]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert run_folder.checkpoints(str(tmp_path / "new")) == {}
    (checkpoint(tmp_path, 200) / ".metadata").unlink()
    with pytest.raises(RunDirectoryError, match="no finished checkpoint in .*piflow distill"):
        run_folder.newest_checkpoint(str(tmp_path))


def test_checkpoint_names_sort_as_numbers_do() -> None:
    names = [run_folder.checkpoint_name(step) for step in (2, 10, 99_999, 100_000)]
    assert names == sorted(names)
