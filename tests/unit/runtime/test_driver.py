"""The driver's loop over attempts, and what it says of workers that failed."""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import ray.train

from piflow.config import Recipe, RuntimeConfig, load_recipe
from piflow.data.cluster import ResourcesError
from piflow.runs.lease import Ownership, RunTakenError
from piflow.runs.tracking import Tracker
from piflow.runtime import alive, driver, mailbox, ray_private, session
from piflow.runtime import attempts as attempting
from piflow.runtime.exits import (
    RayLostError,
    WorkersFailedError,
    WorkersLostError,
    is_ray_lost,
)
from piflow.runtime.mailbox import Failure, Mailbox, StopReason
from piflow.runtime.ray_private import first_failure
from piflow.runtime.session import start_tries
from piflow.runtime.signals import Signals, StoppedError
from piflow.training.step import NonFiniteError

STEPS = 7


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


def test_workers_are_told_whose_checkpoints_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe as it was written, which has another identity than with absolute paths."""
    path = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"
    written = load_recipe(path, ["model.path=teacher"])
    absolute = load_recipe(path, ["model.path=/mnt/teacher"])
    monkeypatch.setattr(ray, "put", lambda value: value)
    run = Mock(recipe=written, absolute=absolute)
    config = driver._training(run, Mock(manifest_hash="ab"), Ownership()).config
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
    monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | StopReason | None, max_failures: int = 3
) -> tuple[Handle, Mock, Any]:
    """The loop over attempts, each of which ends in one of the `outcomes`; None: it finds no room.

    Returns:
        the mailbox, the tracker and a function that runs the loop.
    """
    handle, tracker, left = Handle(), Mock(spec=Tracker), list(outcomes)

    def fit(done: Future[Any], *_: object) -> None:
        outcome = left.pop(0)
        if outcome is None:
            return
        handle.mailbox.join(1)
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            handle.mailbox.leave(outcome, STEPS)
            done.set_result(None)

    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(alive, "ended_processes", list)
    monkeypatch.setattr(mailbox, "is_draining", lambda: False)
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(attempting, "_fit", fit)
    signals, ownership = Signals(), Ownership()
    runtime = RuntimeConfig(max_failures=max_failures, worker_start_timeout=60.0)
    kept = "step {} is saved".format
    work = attempting.Work(Mock(), {}, runtime, STEPS, kept, ownership.require)

    def loop() -> int:
        return attempting.done_by_attempts(work, handle, signals, tracker)

    loop.signals, loop.left, loop.ownership = signals, left, ownership  # type: ignore[attr-defined]
    return handle, tracker, loop


@pytest.mark.parametrize(("max_failures", "made"), [(0, 1), (2, 3), (-1, 4)])
def test_attempts_that_ray_train_gives_up_are_made_again(
    max_failures: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told; the fourth attempt gets through."""
    failures = [ray.train.ControllerError(RuntimeError(f"number {n}")) for n in (1, 2, 3)]
    _, tracker, loop = attempts(monkeypatch, *failures, StopReason.NONE, max_failures=max_failures)
    refusal = pytest.raises(WorkersLostError, match=f"RuntimeError: number {made}")
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


def test_no_workers_are_waited_for_on_a_machine_that_is_taken_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They left for another one before the driver heard that its own machine goes as well."""
    _, _, loop = attempts(monkeypatch, StopReason.MOVE, None, StopReason.NONE)
    monkeypatch.setattr(mailbox, "is_draining", lambda: True)
    with pytest.raises(StoppedError, match="SIGTERM: no worker was at work, nothing is lost"):
        loop()
    assert loop.left == [StopReason.NONE]


def test_what_machines_tell_goes_to_mlflow_while_workers_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle, tracker, loop = attempts(monkeypatch, StopReason.NONE)
    fit = attempting._fit

    def slow_fit(*arguments: Any) -> None:
        handle.mailbox.machine(3, {"system/a/cpu": 1.0})
        handle.mailbox.machine(3, {"system/b/cpu": 2.0})
        while handle.mailbox._machines:
            time.sleep(0.01)
        fit(*arguments)

    monkeypatch.setattr(attempting, "_fit", slow_fit)
    assert loop() == 7
    points = [(call.args[0], call.kwargs) for call in tracker.log_metrics.call_args_list]
    assert points == [({"system/a/cpu": 1.0}, {"step": 3}), ({"system/b/cpu": 2.0}, {"step": 3})]


def test_workers_that_were_told_to_end_are_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, loop = attempts(monkeypatch, StopReason.END, StopReason.NONE)
    loop.signals.number = 15
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
    with pytest.raises(WorkersFailedError, match="shard-00000.parquet is corrupt"):
        loop()


def test_a_driver_whose_run_was_taken_over_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a signal, which would look like somebody's Ctrl-C."""
    _, _, loop = attempts(monkeypatch, StopReason.NONE)
    monkeypatch.setattr(attempting, "_fit", lambda *_: None)  # workers that go on and on
    loop.ownership.lost = RunTakenError("it belongs to process 1 on another-machine")
    with pytest.raises(RunTakenError, match="process 1 on another-machine"):
        loop()


def test_the_death_of_ray_trains_controller_is_another_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = ray.exceptions.RaySystemError("the controller was killed")
    _, tracker, loop = attempts(monkeypatch, died, StopReason.NONE)
    assert loop() == STEPS and loop.left == []
    [call] = tracker.event.call_args_list
    assert call.args[0] == "controller-failed" and "the controller was killed" in call.args[1]


def test_workers_that_get_no_places_in_time_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = ray_private.WorkerGroupStartupTimeoutError(2)
    _, _, loop = attempts(monkeypatch, ray.train.ControllerError(timeout), StopReason.NONE)
    with pytest.raises(ResourcesError, match=r"no places within 60 s"):
        loop()


@pytest.mark.parametrize(
    ("num_workers", "seconds", "tries"),
    [(2, 1800, 0), ((1, 2), 1800, 59), ((1, 2), 10, 0)],
)
def test_ray_train_tries_to_get_places_as_long_as_the_recipe_says(
    num_workers: Any, seconds: float, tries: int
) -> None:
    runtime = RuntimeConfig(num_workers=num_workers, worker_start_timeout=seconds)
    assert start_tries(runtime) == tries


def test_an_error_of_our_own_code_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, loop = attempts(monkeypatch, KeyError("a mistake"), StopReason.NONE)
    with pytest.raises(KeyError, match="a mistake"):
        loop()


def test_a_machine_that_fails_too_often_says_that_another_start_can_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = ray.exceptions.RaySystemError("its node died")
    _, _, loop = attempts(monkeypatch, ray.train.WorkerGroupError("", {0: gone}))
    with pytest.raises(WorkersLostError, match="its node died"):
        loop()
    _, _, loop = attempts(monkeypatch, ray.train.WorkerGroupError("", {0: gone, 1: OSError()}))
    with pytest.raises(WorkersFailedError) as caught:
        loop()
    assert caught.type is WorkersFailedError


def test_a_mailbox_that_forgot_how_workers_ended_is_no_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray starts a dead one anew, empty: the attempt is made again."""
    handle, tracker, loop = attempts(monkeypatch, StopReason.NONE)
    fit, forgot = attempting._fit, []

    def forgetful(done: Future[Any], *rest: object) -> None:
        if forgot:
            fit(done, *rest)
        else:
            forgot.append(True)
            handle.mailbox.join(1)
            handle.mailbox.leave(StopReason.NONE, STEPS)
            handle.mailbox.__init__()  # type: ignore[misc]
            done.set_result(None)

    monkeypatch.setattr(attempting, "_fit", forgetful)
    assert loop() == STEPS
    assert tracker.event.call_args.args[0] == "controller-failed"


@pytest.mark.parametrize(
    "outcome",
    [
        StopReason.MOVE,
        ray.train.WorkerGroupError("", {0: ray.exceptions.RaySystemError("a signal")}),
        ray.train.ControllerError(RuntimeError("a signal")),
    ],
)
def test_a_signal_to_all_processes_at_once_is_the_drivers_end(
    outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that got it as well leave of themselves, or die; no others are started."""
    _, _, loop = attempts(monkeypatch, outcome, StopReason.NONE)
    loop.signals.number = 15
    expected = "SIGTERM: step 7 is saved" if outcome is StopReason.MOVE else "SIGTERM: steps since"
    with pytest.raises(StoppedError, match=expected):
        loop()
    assert loop.left == [StopReason.NONE]


@pytest.mark.parametrize("signalled", [False, True])
def test_a_dead_ray_is_found_out_at_once(signalled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, loop = attempts(monkeypatch, StopReason.NONE)
    monkeypatch.setattr(attempting, "_fit", lambda *_: None)  # workers that go on and on
    monkeypatch.setattr(alive, "ended_processes", lambda: ["gcs_server"])
    loop.signals.number = 15 if signalled else None
    kind = StoppedError if signalled else RayLostError
    with pytest.raises(kind, match="Ray's gcs_server") as raised:
        loop()
    assert is_ray_lost(raised.value), "a signal on top of it doesn't hide it"


@pytest.mark.parametrize("address", ["", "10.0.0.1:6379"])
@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("is_lost", [False, True])
def test_nobody_parts_from_a_cluster_that_is_gone(
    address: str, signalled: bool, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's client would wait for two minutes. An instance of this machine's own is ended."""
    recipe = load_recipe(Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml")
    ended: list[bool] = []
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session, "_start", lambda recipe: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    error: Exception = RayLostError("a head") if is_lost else ValueError("something else")
    with pytest.raises(StoppedError if signalled else type(error)), session.ray_session(recipe):
        try:
            raise error
        except type(error):
            if signalled:
                raise StoppedError(15, "saved") from None
            raise
    assert bool(ended) != (is_lost and bool(address))


def test_a_clusters_head_that_stays_away_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray's own client ends the process: after 45 of its 60 seconds."""
    now = 0.0
    monkeypatch.setattr(alive.time, "monotonic", lambda: now)
    monkeypatch.setattr(alive, "ended_processes", list)
    monkeypatch.setattr(mailbox, "is_draining", lambda: False)
    context = SimpleNamespace(gcs_address="127.0.0.1:1")  # nobody listens
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    watch = alive.RayWatch()
    for _ in range(9):
        now += 5
        watch.require()
    now = 51
    with pytest.raises(RayLostError, match="head at 127.0.0.1:1 didn't answer for 45 s"):
        watch.require()
