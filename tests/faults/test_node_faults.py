"""Nodes come, go and give notice; the run takes what there is and trains what it would have.

Each test has a cluster of its own: a head for the driver, and nodes with room for one worker each.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.runs import (
    SmallRun,
    cluster_environment,
    cluster_of,
    make_store,
    require_equal,
    small_recipe,
    train_workers,
    wait_until,
)

pytestmark = pytest.mark.timeout(900)
STEPS = 60
PACE = 0.5
NOTICE_SECONDS = 60
TOLERANCE = 1e-5  # between numbers of workers


@pytest.fixture
def cluster(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    with cluster_of(num_cpus=0) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    make_store(folder, environment)
    return folder


def new_run(folder: Path, cluster: Any, name: str, pace: float = PACE, **runtime: Any) -> SmallRun:
    training = {"steps": STEPS, "checkpoint_every": 50, "keep_last": 3}
    recipe = small_recipe(folder, name, training=training, runtime={"max_failures": 0, **runtime})
    return SmallRun(folder, recipe, cluster_environment(cluster.address), pace)


def worker_counts(run: SmallRun) -> list[int]:
    """Numbers of workers, in the order in which they were first met."""
    return list(dict.fromkeys(line["workers"] for line in run.lines()))


def steps_with(run: SmallRun, workers: int) -> list[int]:
    """Steps that so many workers trained together, once for each worker."""
    return [line["step"] for line in run.lines() if line["workers"] == workers]


def test_a_node_that_joins_is_used_and_one_that_dies_is_done_without(
    folder: Path, cluster: Any
) -> None:
    """One worker, then two without a lost step, then one again; equal to one worker's run."""
    first = cluster.add_node(num_cpus=1)
    alone = new_run(folder, cluster, "alone", pace=0, num_workers=1)
    with alone.running() as driver:
        alone.finish(driver)
    run = new_run(folder, cluster, "elastic", num_workers=[1, 2], resize_interval=5, max_failures=1)
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 3, "training", run)
        second = cluster.add_node(num_cpus=1)
        wait_until(lambda: 2 in worker_counts(run), "two workers", run)
        grown = run.last_step()
        wait_until(lambda: run.last_step() >= grown + 3, "on with two workers", run)
        assert grown < 45, "the run must still have some steps to go"
        cluster.remove_node(second, allow_graceful=False)
        run.finish(driver, 400)
    assert first in cluster.worker_nodes
    resized = [text for name, text in run.events() if name == "resize"]
    assert resized == ["from 1 to 2 workers", "from 2 to 1 workers"]
    [stop] = [text for name, text in run.events() if name == "stop"]
    assert stop.startswith("the number of workers is about to change; step ")
    saved = int(stop.split()[-3])
    alone_at, both_at = steps_with(run, 1), steps_with(run, 2)
    assert both_at.count(saved) == 2 and saved == min(both_at), "two went on from the save"
    assert alone_at.count(saved) == 1, "what they did was lost with the node, and done again"
    require_equal(run, alone, tolerance=TOLERANCE)


@pytest.mark.parametrize("num_workers", [1, [1, 2]], ids=["moves", "shrinks"])
def test_a_drained_node_is_left_in_time(
    num_workers: int | list[int], folder: Path, cluster: Any
) -> None:
    """The notice (as a cloud's preemption gives it) is answered by a save before the node goes.

    The run goes on on the other node; with a range of workers it had a worker there already.
    """
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    run = new_run(folder, cluster, f"drained-{most}", num_workers=num_workers)
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 3, "training", run)
        used = wait_until(lambda: _node_of_worker(nodes), "a worker", run)
        drain(cluster, used, NOTICE_SECONDS)
        noticed = time.monotonic()
        wait_until(lambda: "stop" in run.names(), "saved", run, NOTICE_SECONDS)
        time.sleep(max(0.0, noticed + NOTICE_SECONDS - time.monotonic()))
        cluster.remove_node(used, allow_graceful=False)
        run.finish(driver, 400)
    [stop] = [text for name, text in run.events() if name == "stop"]
    assert stop.startswith("a machine is going away")
    steps = steps_with(run, 1) + sorted(steps_with(run, 2))[::2]
    assert sorted(steps) == list(range(STEPS)), "no step was repeated"
    after = "restart" if most == 1 else "resize"
    assert [name for name in run.names() if name in ("restart", "resize")] == [after]


def drain(cluster: Any, node: Any, seconds: int) -> None:
    """Give notice that the node will be gone after so many seconds."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node",
        "--address", cluster.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    environment = cluster_environment(cluster.address)
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)


def _node_of_worker(nodes: list[Any]) -> Any:
    """The node whose raylet runs a train worker, or None."""
    workers = set(train_workers())
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        if workers & {child.pid for child in raylet.children(recursive=True)}:
            return node
    return None
