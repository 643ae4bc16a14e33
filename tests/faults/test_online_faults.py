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

from piflow import storage
from piflow.runs import folder as run_folder
from tests.faults.runs import (
    MICRO_BATCHES,
    PROMPTS,
    SmallRun,
    cluster_environment,
    cluster_of,
    small_recipe,
    train_workers,
    wait_until,
)
from tests.faults.test_run_faults import require_equal

pytestmark = pytest.mark.timeout(900)
STEPS = 12


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """A cluster of one node with room for two workers and an encoder."""
    with cluster_of(num_cpus=3) as cluster:
        yield cluster.address


@pytest.fixture(scope="module")
def stored(folder: Path, address: str) -> SmallRun:
    """The run on a store, which nothing happens to."""
    return _finished(_run(folder, address, "stored"))


@pytest.fixture(scope="module")
def online(folder: Path, address: str) -> SmallRun:
    """The run without a store, which nothing happens to."""
    return _finished(_run(folder, address, "online", mode="online"))


def _finished(run: SmallRun) -> SmallRun:
    with run.running() as driver:
        run.finish(driver)
    return run


def _run(
    folder: Path, address: str, name: str, *, mode: str = "store", pace: float = 0.0
) -> SmallRun:
    store = folder / ("store" if mode == "store" else "online-store")
    recipe = small_recipe(
        folder,
        name,
        embed={"mode": mode, "store": str(store)},
        training={"steps": STEPS, "checkpoint_every": 4},
        runtime={"max_failures": -1},
    )
    return SmallRun(folder, recipe, cluster_environment(address), pace)


def test_an_online_run_is_the_stored_one(stored: SmallRun, online: SmallRun) -> None:
    """The same prompts, losses and weights; two epochs."""
    assert not storage.exists(str(Path(online.recipe.embed.store) / "manifest.json"))
    ids = [prompt for step in online.sequence() for prompt in step]
    assert set(Counter(ids).values()) == {STEPS * MICRO_BATCHES // PROMPTS}
    require_equal(online, stored, tolerance=1e-6)


def test_killed_workers_change_nothing_where_prompts_are_encoded_meanwhile(
    folder: Path, address: str, online: SmallRun
) -> None:
    """One worker dies in the first epoch, the other one in the second.

    One of them is rank 0, whose end is the encoding actor's end too.
    """
    run = _run(folder, address, "killed", mode="online", pace=0.5)
    dead: set[int] = set()
    with run.running() as driver:
        for place, step in ((0, 5), (-1, 9)):
            wait_until(lambda known=step: run.last_step() >= known, f"at step {step}", run, 300)
            workers = [pid for pid in train_workers() if pid not in dead]
            os.kill(workers[place], signal.SIGKILL)
            dead |= set(workers)
        run.finish(driver, 400)
    assert len(run.lines()) > len(online.lines()), "no step was ever repeated"
    assert STEPS in run_folder.checkpoints(run.recipe.run_dir)
    require_equal(run, online)
