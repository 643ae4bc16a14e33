"""Pods as `piflow render` writes them get SIGTERM, and SIGKILL when their grace is over.

The driver is a job, so it runs in the head's pod. Ray knows the pods by their own addresses.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from piflow.runs import folder as run_folder
from tests.cluster.clusters import Inputs, JobRun, Pods, is_healthy
from tests.cluster.machines import Machine, Network, delete
from tests.faults.runs import require_equal, small_recipe, wait_until

pytestmark = pytest.mark.timeout(1800)
STEPS = 18
CHECKPOINT_EVERY = 7
PACE = 2.0  # seconds a step: Ray Train looks for notices every 5 s
SECONDS = 1200  # until something has happened on a loaded machine
_WORKER = "ray::RayTrainWorker"


def new_run(inputs: Inputs, name: str, pace: float = PACE, num_workers: int = 2) -> JobRun:
    training = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "keep_last": 3}
    runtime = {"num_workers": num_workers, "max_failures": 0}
    recipe = inputs.recipe(name, training=training, runtime=runtime)
    return JobRun(inputs.folder, recipe, {}, pace)


def pod_of_worker(pods: list[Machine]) -> Machine | None:
    return next((pod for pod in pods if pod.processes(_WORKER)), None)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_sigterm_to_a_pod_drains_its_node_and_its_driver_hears_of_it(
    kind: str, network: Network, tmp_path: Path
) -> None:
    """Ray's processes go on until nobody needs them any more, and then the pod ends by itself."""
    pods = Pods.of(small_recipe(tmp_path, "any"))
    cluster, [worker] = pods.start(network, workers=1)
    pod = cluster.head if kind == "head" else worker
    wait_until(
        lambda: is_healthy(f"http://{pod.address}:52365/api/local_raylet_healthz"),
        "a node",
        seconds=SECONDS,
    )
    command = [sys.executable, str(Path(__file__).with_name("watch_machine.py"))]
    log = tmp_path / "log"
    with log.open("wb") as output:
        driver = pod.start(command, output, RAY_ADDRESS=cluster.address)
    wait_until(lambda: "leaving: False" in log.read_text(), "watching", seconds=SECONDS)
    began = time.monotonic()
    pod.terminate()
    wait_until(lambda: "still answers" in log.read_text(), "told", seconds=pods.grace)
    assert log.read_text().count("leaving: True") == 1
    assert driver.wait(60) == 0
    pod.process.wait(began + pods.grace - time.monotonic())
    print(f"the {kind}'s pod was gone after {time.monotonic() - began:.1f} s of {pods.grace:.0f} s")


def test_a_deleted_pod_saves_and_the_run_goes_on_in_another(
    inputs: Inputs, network: Network
) -> None:
    run = new_run(inputs, "deleted-pod", num_workers=1)
    pods = Pods.of(new_run(inputs, "any").recipe)
    cluster, workers = pods.start(network, workers=2)
    run.submit(cluster)
    wait_until(lambda: run.last_step() >= 3, "training", run, SECONDS)
    used = wait_until(lambda: pod_of_worker(workers), "a worker", run, SECONDS)
    seconds = delete([used], pods.grace)
    print(f"the pod was gone after {seconds:.1f} s of {pods.grace:.0f} s")
    run.succeed(SECONDS)
    [stop] = [text for name, text in run.events() if name == "stop"]
    assert stop.startswith("a machine is going away")
    assert seconds < pods.grace, used.log
    assert [line["step"] for line in run.lines()] == list(range(STEPS)), "no step was repeated"


def test_a_suspended_job_loses_no_step(inputs: Inputs, network: Network) -> None:
    """All pods at once, as when Kueue preempts it; another cluster goes on from storage alone."""
    straight, run = new_run(inputs, "straight", pace=0), new_run(inputs, "suspended")
    pods = Pods.of(run.recipe)
    cluster, workers = pods.start(network, workers=2)
    straight.submit(cluster)
    straight.succeed(SECONDS)
    run.submit(cluster)
    wait_until(lambda: run.last_step() >= CHECKPOINT_EVERY + 1, "training", run, SECONDS)
    seconds = delete([cluster.head, *workers], pods.grace)
    print(f"the pods were gone after {seconds:.1f} s of {pods.grace:.0f} s")
    saved = max(run_folder.checkpoints(run.recipe.run_dir))
    assert saved % CHECKPOINT_EVERY and saved == run.last_step() + 1, "no step is lost"
    assert run.status() == "KILLED"
    seen = len(run.lines())
    network.clear()
    run.pace = 0
    run.submit(pods.start(network, workers=2)[0])
    run.succeed(SECONDS)
    assert ("resume", f"from step {saved}") in run.events()
    assert len(run.lines()) == 2 * STEPS, f"steps were repeated; {seen} before the end"
    require_equal(run, straight)
    assert run.losses() == straight.losses(), "to the bit"
