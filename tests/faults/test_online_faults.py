"""Prompts that are encoded while training runs, and workers that are killed meanwhile.

24 prompts, 4 a step, so six steps an epoch; every fourth step is saved.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from piflow import rundir, storage
from tests.faults.runs import (
    MICRO_BATCHES,
    PROMPTS,
    SmallRun,
    cluster_environment,
    cluster_of,
    small_recipe,
    train_workers,
    wait_until,
    write_inputs,
)
from tests.faults.test_run_faults import require_equal

pytestmark = pytest.mark.timeout(900)
STEPS = 12


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """A cluster of one node with room for two workers and an encoder."""
    with cluster_of(num_cpus=3) as cluster:
        yield cluster.address


def _online_run(folder: Path, address: str, name: str, pace: float = 0.0) -> SmallRun:
    recipe = small_recipe(
        folder,
        name,
        embed={"mode": "online", "store": str(folder / "online")},
        training={"steps": STEPS, "checkpoint_every": 4},
        runtime={"max_failures": -1},
    )
    return SmallRun(folder, recipe, cluster_environment(address), pace)


def test_killed_workers_change_nothing_where_prompts_are_encoded_meanwhile(
    tmp_path: Path, address: str
) -> None:
    """One worker dies in the first epoch, the other one in the second.

    One of them is rank 0, whose end is the encoding actor's end too.
    """
    write_inputs(tmp_path)
    straight = _online_run(tmp_path, address, "straight")
    with straight.running() as driver:
        straight.finish(driver)
    assert not storage.exists(str(tmp_path / "online" / "manifest.json"))
    ids = [prompt for step in straight.sequence() for prompt in step]
    assert set(Counter(ids).values()) == {STEPS * MICRO_BATCHES // PROMPTS}

    run = _online_run(tmp_path, address, "killed", pace=0.5)
    dead: set[int] = set()
    with run.running() as driver:
        for place, step in ((0, 5), (-1, 9)):
            wait_until(lambda known=step: run.last_step() >= known, f"at step {step}", run, 300)
            workers = [pid for pid in train_workers() if pid not in dead]
            os.kill(workers[place], signal.SIGKILL)
            dead |= set(workers)
        run.finish(driver, 400)
    assert len(run.lines()) > len(straight.lines()), "no step was ever repeated"
    assert STEPS in rundir.checkpoints(run.recipe.run_dir)
    require_equal(run, straight)
