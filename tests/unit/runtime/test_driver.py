"""The driver's loop over attempts, and what it says of workers that failed."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import ray.train

from piflow.config import Recipe, load_recipe
from piflow.runs.lease import Ownership, RunTakenError
from piflow.runs.tracking import Tracker
from piflow.runtime import driver
from piflow.runtime.mailbox import Failure, Mailbox, StopReason
from piflow.runtime.ray_private import first_failure
from piflow.runtime.signals import Signals, StoppedError
from piflow.training.step import NonFiniteError


class Remote(Exception):
    """An error as Ray Train hands it over: its text is the remote traceback."""


TRACEBACK = """Traceback (most recent call last):
  File "/site-packages/ray/train/worker.py", line 1, in run
    train_fn()
  File "/piflow/data/store.py", line 9, in read
    raise StoreError(message)
piflow.data.manifest.StoreError: shard-00000.parquet is corrupt;
delete it
"""


def test_the_lowest_ranks_message_comes_without_its_traceback() -> None:
    failures = {1: Remote("second"), 0: Remote(TRACEBACK)}
    assert first_failure(failures) == (
        "worker 0 failed: piflow.data.manifest.StoreError: shard-00000.parquet is corrupt;\n"
        "delete it"
    )


def test_a_failure_without_traceback_is_told_whole() -> None:
    assert first_failure({3: Remote("the actor died")}) == "worker 3 failed: the actor died"
    assert first_failure({}) == "the workers failed"


def test_workers_are_told_whose_checkpoints_are_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the recipe as it was written, which has another identity than with absolute paths."""
    path = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"
    written = load_recipe(path, ["model.path=teacher"])
    absolute = load_recipe(path, ["model.path=/mnt/teacher"])
    trainer = Mock()
    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    run = Mock(recipe=written, absolute=absolute)
    driver._trainer(run, Mock(manifest_hash="ab"), "store", "mailbox", str(tmp_path))
    config = trainer.call_args.kwargs["train_loop_config"]
    assert Recipe.model_validate(config["recipe"]) == absolute
    assert Recipe.model_validate(config["written"]).hash() == written.hash() != absolute.hash()
    assert config["manifest_hash"] == "ab"


class Handle:
    """A mailbox in this process that is called as through its Ray handle."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.mailbox, name))


def attempts(
    monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | StopReason, max_failures: int = 3
) -> tuple[Handle, Mock, Any]:
    """The loop over attempts, each of which ends in one of the `outcomes`.

    Returns:
        the mailbox, the tracker and a function that runs the loop.
    """
    handle, tracker, left = Handle(), Mock(spec=Tracker), list(outcomes)

    def fit(done: Future[Any], *_: object) -> None:
        outcome = left.pop(0)
        handle.mailbox.join(1)
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            handle.mailbox.leave(outcome, 7)
            done.set_result(None)

    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(driver, "_fit", fit)
    run = Mock()
    run.recipe.runtime.max_failures = max_failures
    signals, ownership = Signals(), Ownership()

    def loop() -> int:
        return driver._attempts(run, Mock(), handle, signals, tracker, ownership)

    loop.signals, loop.left, loop.ownership = signals, left, ownership  # type: ignore[attr-defined]
    return handle, tracker, loop


@pytest.mark.parametrize(("max_failures", "made"), [(0, 1), (2, 3), (-1, 4)])
def test_attempts_that_ray_train_gives_up_are_made_again(
    max_failures: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told; the fourth attempt gets through."""
    failures = [ray.train.ControllerError(RuntimeError(f"number {n}")) for n in (1, 2, 3)]
    _, tracker, loop = attempts(monkeypatch, *failures, StopReason.NONE, max_failures=max_failures)
    refusal = pytest.raises(driver.WorkersFailedError, match=f"RuntimeError: number {made}")
    with refusal if made < 4 else nullcontext():
        assert loop() == 7
    told = [call.args for call in tracker.event.call_args_list]
    assert told == [
        ("controller-failed", f"RuntimeError: number {n}") for n in range(1, min(made, 3) + 1)
    ]
    assert len(loop.left) == 4 - made


def test_workers_that_move_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, loop = attempts(monkeypatch, StopReason.MOVE, StopReason.MOVE, StopReason.NONE)
    assert loop() == 7 and loop.left == []


def test_workers_that_were_told_to_end_are_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, loop = attempts(monkeypatch, StopReason.END, StopReason.NONE)
    loop.signals.number, loop.signals._passed_on = 15, True
    with pytest.raises(StoppedError, match="SIGTERM: step 7 is saved"):
        loop()


def test_a_failed_save_does_not_hide_a_loss_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers say why they give up before they save; what fails afterwards doesn't count."""
    failed = ray.train.WorkerGroupError("", {0: RuntimeError("the upload failed")})
    handle, _, loop = attempts(monkeypatch, failed, StopReason.NONE)
    handle.mailbox.give_up(Failure("non-finite", "step 3: loss nan"))
    handle.mailbox.give_up(Failure("recipe", "a later word, which doesn't count"))
    with pytest.raises(NonFiniteError, match="step 3: loss nan"):
        loop()
    assert loop.left == [StopReason.NONE], "another attempt would end the same way"


def test_workers_that_failed_too_often_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ray.train.WorkerGroupError("", {1: Remote(TRACEBACK)})
    _, _, loop = attempts(monkeypatch, failed, StopReason.NONE)
    with pytest.raises(driver.WorkersFailedError, match="shard-00000.parquet is corrupt"):
        loop()


def test_a_driver_whose_run_was_taken_over_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a signal, which would look like somebody's Ctrl-C."""
    _, _, loop = attempts(monkeypatch, StopReason.NONE)
    monkeypatch.setattr(driver, "_fit", lambda *_: None)  # workers that go on and on
    loop.ownership.lost = RunTakenError("it belongs to process 1 on another-machine")
    with pytest.raises(RunTakenError, match="process 1 on another-machine"):
        loop()
