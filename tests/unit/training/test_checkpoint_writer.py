"""Saving behind the steps: nothing of training gets into a checkpoint, and no kill loses one."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from torch import Tensor

from piflow import storage
from piflow.config import TrainingConfig
from piflow.runs import folder as run_folder
from piflow.sharding.single import SingleStrategy
from piflow.storage import files
from piflow.training import checkpoint_writer
from piflow.training.checkpoint import (
    CheckpointError,
    FileRecord,
    ForeignCheckpointError,
    RunState,
    load_state,
    load_tensors,
    write_shards,
)
from piflow.training.checkpoint_writer import CheckpointSaver, restore_newest
from piflow.training.snapshot import Snapshot
from piflow.training.step import Trainer

SCRIPT = Path(__file__).with_name("saving_workers.py")
State = dict[str, Tensor]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


training = _module(SCRIPT.with_name("resharded_training.py"))
train, whole_state = training.train, training.whole_state


def state(step: int) -> RunState:
    return RunState(step, 8 * step, "0123456789abcdef", "run-id", {"name": "test"})


def trainer() -> Trainer:
    return training.make("adamw", SingleStrategy(torch.device("cpu")))


def saves_into(run_dir: Path, **training: Any) -> CheckpointSaver:
    return CheckpointSaver(str(run_dir), TrainingConfig(checkpoint_every=1, **training))


def copied(trainer: Trainer) -> State:
    return {name: value.clone() for name, value in whole_state(trainer).items()}


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@contextmanager
def opened(uri: str) -> Iterator[Path]:
    yield Path(uri)


def restore(run_dir: Path) -> tuple[RunState | None, State, list[str]]:
    """Where a fresh trainer is after resuming, what it holds, and what was told."""
    fresh, told = trainer(), []
    found = restore_newest(str(run_dir), fresh, opened, told.append)
    return found, whole_state(fresh), told


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def run_dir(tmp_path: Path) -> tuple[Path, dict[int, State]]:
    """A run with checkpoints of its first three steps, and what they hold."""
    ours, saves, held = trainer(), saves_into(tmp_path, keep_last=3), {}
    for step in range(3):
        train(ours, step, step + 1)
        saves.save(ours, state(step + 1))
        held[step + 1] = copied(ours)
    saves.wait()
    return tmp_path, held


def test_a_checkpoint_under_another_steps_name_is_not_gone_on_from(
    run_dir: tuple[Path, dict[int, State]],
) -> None:
    """Its weights would be taken for those of a later step, its folder for that step's own."""
    folder = run_dir[0] / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000009")
    with pytest.raises(ForeignCheckpointError, match="of step 2, its folder's name says 9"):
        restore(run_dir[0])


# ------------------------------------------------------------------------------- behind the steps


def test_a_checkpoint_holds_the_step_it_was_started_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, and changes every tensor, before the first byte is written."""
    go = threading.Event()

    def held_back(
        folder: Path, tensors: Mapping[str, Tensor], group: None
    ) -> dict[str, FileRecord]:
        assert go.wait(20)
        return write_shards(folder, tensors, group)

    monkeypatch.setattr(checkpoint_writer, "write_shards", held_back)
    ours, saves = trainer(), saves_into(tmp_path)
    train(ours, 0, 2)
    before = copied(ours)
    future = saves.save(ours, state(2))
    train(ours, 2, 4)
    assert not future.done() and saves.take_finished() == []
    assert run_folder.checkpoints(str(tmp_path)) == {}
    go.set()
    saves.wait()
    found, tensors, told = restore(tmp_path)
    assert found == state(2) and told == []
    assert same(tensors, before) and not same(copied(ours), before)


def test_the_next_update_waits_for_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward passes don't; what is saved is what was there before."""
    go, copying = threading.Event(), Snapshot.copy

    def held_back(snapshot: Snapshot) -> dict[str, Tensor]:
        assert go.wait(20)
        return copying(snapshot)

    monkeypatch.setattr(Snapshot, "copy", held_back)
    ours, saves = trainer(), saves_into(tmp_path)
    train(ours, 0, 1)
    before, computed = copied(ours), threading.Event()
    weights = [parameter.detach().clone() for parameter in ours.parameters.values()]
    waiting = threading.Thread(target=train, args=(ours, 1, 2))
    saves.save(ours, state(1))
    ours.before_update(computed.set)  # asked before the snapshot's own wait
    waiting.start()
    assert computed.wait(20), "the losses and gradients are there"
    assert all(map(torch.equal, ours.parameters.values(), weights))
    go.set()
    waiting.join(20)
    saves.wait()
    (saved,) = saves.take_finished()
    assert saved.stall_seconds > 0
    _, tensors, _ = restore(tmp_path)
    assert same(tensors, before) and not same(copied(ours), before)


def test_one_save_at_a_time_and_the_wait_counts_as_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []

    def slow(folder: Path, tensors: Mapping[str, Tensor], group: None) -> dict[str, FileRecord]:
        running.append(1)
        assert sum(running) == 1, "two snapshots in memory"
        threading.Event().wait(0.3)
        running.append(-1)
        return write_shards(folder, tensors, group)

    monkeypatch.setattr(checkpoint_writer, "write_shards", slow)
    ours, saves = trainer(), saves_into(tmp_path)
    train(ours, 0, 1)
    for step in (1, 2):
        saves.save(ours, state(step))
    saves.wait()
    first, second = saves.take_finished()
    assert (first.step, second.step) == (1, 2) and saves.take_finished() == []
    assert first.write_seconds >= 0.3 and first.stall_seconds < 0.2
    assert second.stall_seconds > 0.2


def test_two_workers_save_while_they_train(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """The writers' collectives and the steps' don't meet; one worker's trouble is everyone's."""
    run_ranks(SCRIPT, tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=True)

    alone = trainer()
    assert results["losses"] == pytest.approx(train(alone, 0, 6), rel=1e-5)
    assert results["kept"] == [3, 4] and results["unfinished"] < 4
    found, tensors, _ = restore(tmp_path / "run")
    assert found is not None and found.step == 4
    assert same(tensors, results[4])

    reason = "worker 1: no route to the storage. Earlier checkpoints are as they were"
    assert all(reason in message for message in results["messages"])
    assert results["restored"] == 3, "rank 1's copy of step 4 is damaged: both go back"
    assert same(results["restored tensors"], results[3])
    assert "step 4: " in results["told"][0] and "Going on from step 3" in results["told"][0]
    assert results["left"] == ["step_00000003", "step_00000004"], "the half-written one is gone"


# ----------------------------------------------------------------------------- killed in the middle


class Dying:
    """From the `moment`-th operation on nothing reaches the disk any more."""

    def __init__(self, moment: int) -> None:
        self.moment = moment
        self.operations = 0

    def __call__(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.operations += 1
            if self.operations > self.moment:
                raise OSError(errno.EIO, "the process is dead")
            return operation(*args)

        return counted


def half(folder: Path, tensors: Mapping[str, Tensor], group: None = None) -> dict[str, FileRecord]:
    """Shards of which one is cut short, another not there yet."""
    write_shards(folder, tensors, group)
    (folder / "metadata.json").unlink()
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    raise OSError(errno.EIO, "the process is dead")


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(again: bool, tmp_path: Path) -> None:
    """Also where a save replaces a damaged checkpoint of the same step."""
    held: dict[int, State] = {}
    outcomes = []
    for moment in range(20):
        run_dir = tmp_path / str(moment)
        ours, saves = trainer(), saves_into(run_dir, keep_last=1)
        train(ours, 0, 1)
        saves.save(ours, state(1))
        held[1] = copied(ours)
        saves.wait()
        train(ours, 1, 2)
        held[2] = copied(ours)
        if again:
            keep = saves_into(run_dir, keep_last=2)
            keep.save(ours, state(2))
            keep.wait()
            flip(run_dir / "checkpoints" / "step_00000002" / "__0_0.distcp")
        dying = Dying(moment)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_writer, "write_shards", dying(write_shards))
            for name in ("write_bytes", "delete_file", "delete_folder"):
                patch.setattr(storage, name, dying(getattr(storage, name)))
            saves.save(ours, state(2))
            try:
                saves.wait()
            except CheckpointError as error:
                assert "step_00000002: OSError" in str(error)
        found, tensors, _ = restore(run_dir)
        assert found is not None and same(tensors, held[found.step]), moment
        intact = set(run_folder.checkpoints(str(run_dir)))
        assert found.step in intact
        outcomes.append(found.step)
        if dying.operations <= moment:
            break
    assert outcomes == sorted(outcomes) and outcomes.count(1) >= 3 and outcomes.count(2) >= 2
    assert folders(run_dir) == ["step_00000002"]


def flip(file: Path, position: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 1
    file.write_bytes(content)


def test_what_a_killed_save_left_is_ignored_and_cleaned_up(
    run_dir: tuple[Path, dict[int, State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, held = run_dir
    ours, saves = trainer(), saves_into(folder)
    train(ours, 0, 4)
    monkeypatch.setattr(checkpoint_writer, "write_shards", half)
    saves.save(ours, state(4))
    with pytest.raises(CheckpointError, match="could not save .*step_00000004: OSError.*is dead"):
        saves.wait()
    with pytest.raises(CheckpointError, match="could not save"):
        saves.save(ours, state(5))
    assert folders(folder)[-1] == "step_00000004" and max(run_folder.checkpoints(str(folder))) == 3
    found, tensors, told = restore(folder)
    assert found == state(3) and same(tensors, held[3]) and told == []
    assert folders(folder) == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_shards", full)
    saves = saves_into(tmp_path)
    saves.save(trainer(), state(1))
    with pytest.raises(CheckpointError, match="free some space, lower training.keep_last"):
        saves.wait()


# -------------------------------------------------------------------------------- going on from it


def test_a_new_run_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    fresh, before = trainer(), copied(trainer())
    assert restore_newest(str(tmp_path / "new"), fresh, opened, print) is None
    assert same(copied(fresh), before)


@pytest.mark.parametrize("file", ["__0_0.distcp", "metadata.json", "state.json"])
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    file: str, run_dir: tuple[Path, dict[int, State]]
) -> None:
    folder, held = run_dir
    flip(folder / "checkpoints" / "step_00000003" / file)
    found, tensors, told = restore(folder)
    assert found == state(2) and same(tensors, held[2])
    assert len(told) == 1 and file in told[0] and "Going on from step 2" in told[0]
    assert len(folders(folder)) == 3, "evidence stays"

    ours, saves = trainer(), saves_into(folder, keep_last=3)
    train(ours, 0, 3)
    saves.save(ours, state(3))
    saves.wait()
    found, tensors, told = restore(folder)
    assert found == state(3) and same(tensors, held[3]) and told == []


def test_no_run_starts_from_zero_because_all_checkpoints_are_damaged(
    run_dir: tuple[Path, dict[int, State]],
) -> None:
    folder, _ = run_dir
    for step in (1, 2, 3):
        flip(folder / "checkpoints" / run_folder.checkpoint_name(step) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints .*Check the machine"):
        restore(folder)
    assert len(folders(folder)) == 3


def test_another_models_checkpoint_is_refused_not_skipped(
    run_dir: tuple[Path, dict[int, State]],
) -> None:
    folder, _ = run_dir
    ours, saves = trainer(), saves_into(folder, keep_last=9)
    for tensors in (ours.parameters, ours.ema_parameters):
        tensors["renamed"] = tensors.pop("small.bias")
    saves.save(ours, state(4))
    saves.wait()
    with pytest.raises(CheckpointError, match="step_00000004 doesn't fit this model"):
        restore(folder)


# ------------------------------------------------------------------------------- kept, and uploaded


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"keep_last": 1}, [7]),
        ({"keep_last": 2, "keep_every": 3}, [3, 6, 7]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 6, 7]),
    ],
)
def test_retention(keep: dict[str, int], kept: list[int], tmp_path: Path) -> None:
    ours, saves = trainer(), saves_into(tmp_path, **keep)
    for step in range(1, 8):
        saves.save(ours, state(step))
        saves.wait()
        assert max(run_folder.checkpoints(str(tmp_path))) == step
    assert list(run_folder.checkpoints(str(tmp_path))) == kept
    assert folders(tmp_path) == [run_folder.checkpoint_name(step) for step in kept]


def test_no_checkpoint_counts_before_what_goes_with_it_is_safe(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError("can't be kept")

    saves = CheckpointSaver(str(tmp_path), TrainingConfig(checkpoint_every=1), refuse)
    saves.save(trainer(), state(1))
    with pytest.raises(CheckpointError, match="can't be kept"):
        saves.wait()
    assert run_folder.checkpoints(str(tmp_path)) == {}


def test_the_best_are_kept_across_restarts(tmp_path: Path) -> None:
    """Each save by a saver of its own: the choice lies in the checkpoints alone."""
    losses = [3.0, 1.0, 2.0, 5.0, 0.5, 4.0]
    kept = []
    for step, loss in enumerate(losses, 1):
        saves = saves_into(tmp_path, keep_last=1, keep_best=2)
        saves.save(trainer(), replace(state(step), loss=loss))
        saves.wait()
        kept.append(list(run_folder.checkpoints(str(tmp_path))))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 5], [2, 5, 6]]
    newest = run_folder.checkpoints(str(tmp_path))[6]
    assert load_state(Path(newest)) == replace(state(6), loss=4.0)


@pytest.mark.parametrize("failures", [0, 2, 9])
def test_an_object_store_that_fails_is_tried_again(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects stand in as files; what is listed arrives before `state.json`."""
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    tries = []

    def copy(source: str, target: str, *, destination_filesystem: fs.FileSystem) -> None:
        tries.append(target)
        assert not destination_filesystem.get_file_info(f"{target}/state.json").is_file
        if len(tries) <= failures:
            raise OSError(errno.EIO, "AWS Error SLOW_DOWN")
        copy_files(source, target, destination_filesystem=destination_filesystem)

    def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
        return (remote, uri.removeprefix("s3://")) if uri.startswith("s3://") else local(uri)

    def write(uri: str, content: bytes) -> None:
        tries.append(uri)
        if len(tries) <= 2 * failures + 1:
            raise OSError(errno.EIO, "AWS Error SLOW_DOWN")
        write_bytes(str(tmp_path / uri.removeprefix("s3://")), content)

    copy_files, local, write_bytes = fs.copy_files, storage.filesystem, storage.write_bytes
    monkeypatch.setattr(fs, "copy_files", copy)
    monkeypatch.setattr(checkpoint_writer, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(storage, "write_bytes", write)
    for module in (storage, files):
        monkeypatch.setattr(module, "filesystem", filesystem)
    ours, saves = trainer(), saves_into(Path("unused"))
    saves.run_dir = "s3://bucket/run"
    train(ours, 0, 1)
    saves.save(ours, state(1))
    if failures == 9:
        with pytest.raises(CheckpointError, match="upload failed 3 times: .*SLOW_DOWN"):
            saves.wait()
        assert run_folder.checkpoints("s3://bucket/run") == {}
        return
    saves.wait()
    assert len(tries) == 2 * (failures + 1)
    monkeypatch.undo()
    stored = tmp_path / "bucket" / "run" / "checkpoints" / "step_00000001"
    assert torch.equal(load_tensors(stored, "ema")["small.bias"], ours.ema_parameters["small.bias"])


def test_files_on_another_machines_disk_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*args: object) -> dict[str, FileRecord]:
        return {"__1_0.distcp": FileRecord(20, "")}

    monkeypatch.setattr(checkpoint_writer, "write_shards", elsewhere)
    saves = saves_into(tmp_path)
    saves.save(trainer(), state(1))
    with pytest.raises(CheckpointError, match="first __1_0.distcp; put run_dir on storage that al"):
        saves.wait()
    assert run_folder.checkpoints(str(tmp_path)) == {}
