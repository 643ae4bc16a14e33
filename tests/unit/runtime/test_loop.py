"""The loop of one worker, around a trainer that refuses given steps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from piflow.config import Fp8TeacherConfig, Recipe, load_recipe
from piflow.roles.fp8 import TeacherPrecisionError
from piflow.runtime.loop import TrainLoop
from piflow.runtime.mailbox import Failure, StopReason
from piflow.runtime.worker_metrics import WorkerMetrics
from piflow.training.checkpoint import (
    STATE_FILE,
    CheckpointError,
    ForeignCheckpointError,
    state_file,
    write_shards,
)
from piflow.training.step import NonFiniteError, StepMetrics

MANIFEST = "ab" * 32


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, and an actor's answers as they are."""
    context = SimpleNamespace(get_world_rank=lambda: 0, get_local_rank=lambda: 0)
    monkeypatch.setattr("piflow.runtime.worker.ray.train.get_context", lambda: context)
    monkeypatch.setattr("piflow.runtime.worker.ray.get", lambda answer: answer)


def _loop(
    bad: set[int], max_skipped_steps: int, saved: list[int], *overrides: str
) -> tuple[TrainLoop, MagicMock]:
    def step(step: int, micro_batches: Any) -> StepMetrics:
        if step in bad:
            raise NonFiniteError(f"step {step}: loss nan (prompt ids: a).", "Try this")
        return StepMetrics(step, float(step), 1.0, 0.1)

    recipe: Recipe = load_recipe(
        Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml",
        ["training.steps=6", "training.checkpoint_every=3", "training.sample_every=0",
         "training.log_every=1", f"training.max_skipped_steps={max_skipped_steps}", *overrides],
    )  # fmt: skip
    tracker = MagicMock()
    assembly: Any = SimpleNamespace(
        trainer=SimpleNamespace(step=step, trained=7),
        flops=lambda batch: 1,
        teacher_error=None,
        bring=lambda batch: batch,
    )
    config = {
        "written": recipe.model_dump(mode="json"),
        "manifest_hash": MANIFEST,
        "run_id": "run",
        "mailbox": MagicMock(),
        "owner": None,
    }
    stops: Any = SimpleNamespace(agreed=lambda: StopReason.NONE)
    metrics = WorkerMetrics(recipe.name, 0, None, torch.device("cpu"))
    loop = TrainLoop(recipe, config, assembly, tracker, metrics, stops, MagicMock())
    loop._save = saved.append  # type: ignore[method-assign]
    return loop, tracker


def test_an_fp8_teacher_is_measured_at_the_start_and_every_so_often() -> None:
    """From step 1 on (a resumed run), every second step; the third measurement is too large."""
    saved: list[int] = []
    loop, tracker = _loop(set(), 0, saved)
    errors = {1: 0.01, 2: 0.02, 4: 0.3}
    model = loop.recipe.model.model_copy(
        update={"fp8_teacher": Fp8TeacherConfig(check_every=2, max_error=0.1)}
    )
    loop.recipe = loop.recipe.model_copy(update={"model": model})
    loop.assembly.teacher_error = lambda batch, step: errors.pop(step)  # type: ignore[misc]
    with pytest.raises(TeacherPrecisionError, match="step 4: .* off by 0.3 .*max_error is 0.1"):
        loop.run(1, _stream())
    assert errors == {} and saved == [3]
    calls = [(call.args[0], call.kwargs["step"]) for call in tracker.log_metrics.call_args_list]
    told = {step: values["fp8_teacher_error"] for values, step in calls if len(values) == 1}
    assert told == {1: 0.01, 2: 0.02, 4: 0.3}


def _stream() -> Any:
    batch = SimpleNamespace(micro_batches=[None], replaced={})
    return SimpleNamespace(batches=lambda: iter([batch] * 6), epoch_of=float)


def test_what_is_measured_is_told_at_every_checkpoint() -> None:
    """The first step of a process, which compiles and allocates, isn't timed."""
    saved: list[int] = []
    loop, _ = _loop({2}, 1, saved)
    loop.run(0, _stream())
    told = [call.args[0] for call in loop.mailbox.figures.remote.call_args_list]
    assert [(item.steps, item.trained, item.peak_memory) for item in told] == [
        (1, 7, None),
        (4, 7, None),
    ]
    assert saved == [3, 6] and all(item.step_seconds > 0 for item in told)


def test_skipped_steps_are_told_and_checkpoints_are_still_due() -> None:
    saved: list[int] = []
    loop, tracker = _loop({2, 3}, 1, saved)
    loop.run(0, _stream())
    assert saved == [3, 6]
    events = [call.args for call in tracker.event.call_args_list]
    assert events == [
        ("skip", "step 2: loss nan (prompt ids: a)."),
        ("skip", "step 3: loss nan (prompt ids: a)."),
    ]
    points = {
        call.kwargs["step"]: call.args[0]["skipped_steps"]
        for call in tracker.log_metrics.call_args_list
    }
    assert points == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_machines_first_worker_tells_how_it_is_doing(
    local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a name that stays when ranks change, whatever its rank is now."""
    context = SimpleNamespace(get_world_rank=lambda: 2, get_local_rank=lambda: local_rank)
    monkeypatch.setattr("piflow.runtime.worker.ray.train.get_context", lambda: context)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "rack 7")
    loop, tracker = _loop(set(), 0, [], "tracking.system_metrics=true", "training.log_every=3")
    loop.run(0, _stream())
    told = {call.args[0]: call.args[1] for call in loop.mailbox.machine.remote.call_args_list}
    assert list(told) == ([1, 3, 6] if local_rank == 0 else [])
    names = {name for values in told.values() for name in values}
    assert ("system/rack-7/cpu_utilization_percentage" in names) == (local_rank == 0)
    assert not tracker.log_metrics.called, "rank 0 alone logs the run's metrics"


@pytest.mark.parametrize(
    ("start", "bad", "means"),
    [(0, set(), {3: 1.0, 6: 4.0}), (0, {2, 3}, {3: 0.5, 6: 4.5}), (3, {3, 4, 5}, {6: None})],
)
def test_a_checkpoint_knows_the_mean_loss_since_the_one_before(
    start: int, bad: set[int], means: dict[int, float | None]
) -> None:
    """Of the steps that were not skipped; a resumed run starts at a checkpoint."""
    found: dict[int, float | None] = {}
    loop, _ = _loop(bad, 3, [])
    loop._save = lambda step: found.update({step: loop._state(step).loss})  # type: ignore[method-assign]
    loop.run(start, _stream())
    assert found == means


def test_replaced_rows_are_counted_and_each_row_group_is_told_once() -> None:
    loop, tracker = _loop(set(), 0, [], "training.damaged_rows=replace")
    damage = [{}, {"row group 1 of a": 2}, {"row group 1 of a": 1, "row group 0 of b": 3}]
    batches = [
        SimpleNamespace(micro_batches=[None], replaced=names) for names in (*damage, {}, {}, {})
    ]
    loop.run(0, SimpleNamespace(batches=lambda: iter(batches), epoch_of=float))  # type: ignore[arg-type]
    events = [call.args[1] for call in tracker.event.call_args_list]
    assert [text.split(" can't")[0] for text in events] == ["row group 1 of a", "row group 0 of b"]
    counts = [
        call.args[0]["replaced_rows"]
        for call in tracker.log_metrics.call_args_list
        if "replaced_rows" in call.args[0]
    ]
    assert counts == [0, 2, 6, 6, 6, 6]


@pytest.mark.parametrize(
    ("state", "message"),
    [({}, None), ({"manifest_hash": "cd" * 32}, "was trained on store cdcdcdcdcdcdcdcd"),
     ({"recipe_hash": "0123", "identity": None}, "step_00000003 was written by recipe 0123")],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_not_restored(
    state: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint says of its run is what is asked of it; the trainer isn't touched."""
    loop, _ = _loop(set(), 0, [], f"run_dir={tmp_path}")
    folder = tmp_path / "checkpoints" / "step_00000003"
    files = write_shards(folder, {"trainable.a": torch.zeros(2)})
    (folder / STATE_FILE).write_bytes(state_file(replace(loop._state(3), **state), files))
    monkeypatch.setattr("piflow.runtime.loop._opened", lambda uri: nullcontext(Path(uri)))
    restored = MagicMock(side_effect=KeyError("it goes on"))
    monkeypatch.setattr("piflow.training.checkpoint._allocate_optimizer_state", restored)
    expected = KeyError if message is None else ForeignCheckpointError
    with pytest.raises(expected, match=message or "it goes on"):
        loop.resume()
    assert restored.called == (message is None)


def test_one_skip_too_many_stops_before_the_next_checkpoint() -> None:
    saved: list[int] = []
    loop, _ = _loop({3, 4}, 1, saved)
    with pytest.raises(NonFiniteError, match="step 4: loss nan .prompt ids: a.. Try this"):
        loop.run(0, _stream())
    assert saved == [3]


@pytest.mark.parametrize("problem", [CheckpointError("upload failed"), OSError("disk is full")])
def test_the_reason_to_give_up_is_left_before_a_save_can_fail(problem: Exception) -> None:
    """An error of the save must not end the worker: Ray Train would start it again."""
    loop, tracker = _loop(set(), 0, [])
    said: list[str] = []
    loop.mailbox.give_up.remote.side_effect = lambda failure: said.append(failure.message)

    def wait() -> None:
        said.append("saving")
        raise problem

    loop.saver = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    loop.give_up(Failure("non-finite", "step 3: loss nan"))
    assert said == ["step 3: loss nan", "saving"]
    assert [call.args for call in tracker.event.call_args_list] == [
        ("non-finite", "step 3: loss nan"),
        ("save-failed", str(problem)),
    ]
