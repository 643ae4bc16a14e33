"""A run goes on, and ends as if nothing had happened, whatever happens to its processes and nodes.

Every run is the same small one, on a cluster of this module's own: 24 prompts, 4 a step.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from piflow.runs import folder as run_folder
from piflow.training.checkpoint import load_tensors
from piflow.training.export import student_of_checkpoint
from tests.faults.runs import (
    SmallRun,
    cluster_environment,
    require_equal,
    small_recipe,
    train_workers,
    wait_until,
)

pytestmark = pytest.mark.timeout(900)
STEPS = 40
KILLS, KILL_STEPS = 20, 80
START_SECONDS = 12.0  # of an attempt, within which a kill comes
TRAINING_STEPS, STEP_SECONDS = 8, 1.5  # after at most so many steps, and within the next one
STALL_SECONDS = 60.0  # longer than a worker takes to its first step


def new_run(
    folder: Path,
    address: str,
    name: str,
    pace: float = 0.0,
    steps: int = STEPS,
    checkpoint_every: int = 5,
    **runtime: object,
) -> SmallRun:
    """A run that keeps the last two checkpoints."""
    training = {"steps": steps, "checkpoint_every": checkpoint_every, "keep_last": 2}
    recipe = small_recipe(folder, name, training=training, runtime=runtime)
    return SmallRun(folder, recipe, cluster_environment(address), pace)


@pytest.fixture(scope="module")
def straight(folder: Path, address: str) -> SmallRun:
    """The run that nothing happens to."""
    run = new_run(folder, address, "straight")
    with run.running() as driver:
        run.finish(driver)
    assert run.names() == ["start", "strategy", "attention", *["checkpoint"] * (STEPS // 5)]
    return run


def test_sigterm_saves_and_the_same_command_goes_on(
    folder: Path, address: str, straight: SmallRun
) -> None:
    run = new_run(folder, address, "sigterm", 0.3, checkpoint_every=STEPS)  # none but the stop's
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 2, "at step 2", run)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 128 + signal.SIGTERM, run.log
    assert run.status() == "KILLED"
    [saved] = run_folder.checkpoints(run.recipe.run_dir)
    assert saved == run.last_step() + 1 < STEPS, "no step is lost"
    assert f"stopped by SIGTERM: step {saved} is saved. The same command goes on" in run.log
    assert run.names()[3:] == ["checkpoint", "stop"]
    with run.running() as driver:
        run.finish(driver)
    assert ("resume", f"from step {saved}") in run.events()
    require_equal(run, straight)


@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_change_nothing(folder: Path, address: str) -> None:
    """SIGKILL of a worker, of all workers or of the driver, at seeded random moments of its life.

    Half of the moments count from when the workers' processes are there (start-up, restoring),
    half come after a number of steps (steps, saves). After the driver's death the same command is
    started again.
    """
    straight = new_run(folder, address, "long", steps=KILL_STEPS)
    with straight.running() as driver:
        straight.finish(driver)
    run = new_run(folder, address, "kills", 0.3, KILL_STEPS, checkpoint_every=2, max_failures=-1)
    generator = random.Random(2026)
    kinds: Counter[str] = Counter()
    training = 0  # kills after the first step of an attempt
    phases = ["start", "training"] * (KILLS // 2)
    generator.shuffle(phases)
    dead: set[int] = set()
    driver = run.start()

    def alive() -> list[int]:
        """Workers that are not those of a kill; they may be few while they start or end."""
        assert driver.poll() is None, f"it ended after {kinds.total()} kills: {run.log}"
        return sorted(set(train_workers()) - dead)

    try:
        for phase in phases:
            wait_until(alive, "started again", run)
            seen = len(run.lines())
            if phase == "training":
                lines = seen + 2 * generator.randint(1, TRAINING_STEPS)  # of two workers
                wait_until(lambda known=lines: alive() and len(run.lines()) >= known, "on", run)
            time.sleep(generator.uniform(0, START_SECONDS if phase == "start" else STEP_SECONDS))
            workers = wait_until(alive, "there", run)
            kind = generator.choice(("worker", "all workers", "driver"))
            targets = {"worker": [generator.choice(workers)], "all workers": workers}
            for pid in targets.get(kind, [driver.pid]):
                os.kill(pid, signal.SIGKILL)
            if kind == "driver":
                driver.wait()
                driver = run.start()
            kinds[kind] += 1
            training += len(run.lines()) > seen
            dead |= set(workers)
        run.finish(driver, 900)
    finally:
        driver.kill()
        driver.wait()
    resumed = [text for name, text in run.events() if name == "resume"]
    print(f"{dict(kinds)}, {training} of them between an attempt's first step and its end")
    print(f"resumed {resumed}; {len(run.lines())} steps of a worker for {2 * KILL_STEPS}")
    assert kinds.total() == KILLS and min(kinds.values()) >= 3 and training >= KILLS // 2
    assert len(run.lines()) > len(straight.lines()), "no step was ever repeated"
    assert len(set(resumed)) >= 5, "the kills must be spread over the run"
    require_equal(run, straight)


def test_sigterm_to_a_worker_moves_the_run(folder: Path, address: str, straight: SmallRun) -> None:
    """All workers save after the step and others go on; it counts as no failure."""
    run = new_run(folder, address, "moved", pace=0.3, max_failures=0)
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 2, "at step 2", run)
        os.kill(train_workers()[0], signal.SIGTERM)
        run.finish(driver)
    [(_, stop)] = [event for event in run.events() if event[0] == "stop"]
    saved = int(stop.rpartition("; step ")[2].split()[0])
    assert "a worker got SIGTERM" in stop and 3 <= saved < STEPS
    assert run.names().count("restart") == 1 and ("resume", f"from step {saved}") in run.events()
    assert len(run.lines()) == 2 * STEPS, "no step was repeated"
    require_equal(run, straight)


@pytest.mark.parametrize("kind", ["hang", "stopped"])
def test_a_stalled_worker_is_found_and_replaced(
    kind: str, folder: Path, address: str, straight: SmallRun
) -> None:
    """A train loop that hangs, and a process that the system stopped (SIGSTOP)."""
    run = new_run(folder, address, f"stall-{kind}", max_failures=2, stall_timeout=STALL_SECONDS)
    run.records.mkdir()
    if kind == "hang":
        (run.records / "hang").touch()
    else:
        run.pace = 0.3
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 0, "at the first step", run)
        victims = train_workers()
        if kind == "stopped":
            os.kill(victims[-1], signal.SIGSTOP)
        wait_until(lambda: not set(victims) & set(train_workers()), "ended", run, 400)
        run.finish(driver)
    [(_, text)] = [event for event in run.events() if event[0] == "stall"]
    assert text.startswith("no step for ")
    assert "restart" in run.names()
    require_equal(run, straight)


def test_a_non_finite_loss_stops_the_run_and_loses_nothing(folder: Path, address: str) -> None:
    """A rate of 1e12: the first step's weights are the last finite ones."""
    training = {"steps": 4, "checkpoint_every": 1, "optimizer": {"lr": 1e12, "warmup_steps": 0}}
    recipe = small_recipe(folder, "non-finite", training=training)
    run = SmallRun(folder, recipe, cluster_environment(address))
    with run.running() as driver:
        assert driver.wait(300) == 1
    ((_, message),) = [event for event in run.events() if event[0] == "non-finite"]
    assert message.startswith("step 1: loss nan") and "last checkpoint is good" in message
    assert message.split("(")[0] in run.log, "the command's own error"
    named = message.partition("prompt ids: ")[2].partition(")")[0].split(", ")
    assert 1 <= len(set(named)) <= 4 and set(named) <= set(run.sequence()[1])
    assert run.status() == "FAILED"
    assert [step for step, _ in run.losses()] == [1]
    assert list(run_folder.checkpoints(recipe.run_dir)) == [1]
    checkpoint = run_folder.newest_checkpoint(recipe.run_dir)
    student_of_checkpoint(recipe, checkpoint, "student")  # which loads
    for section in ("trainable", "ema"):
        for tensor in load_tensors(Path(checkpoint), section).values():
            assert bool(tensor.isfinite().all())
