"""Hosts that vanish: the workers' link is cut, the head's machine loses its power.

Whatever goes on or is resumed ends with the undisturbed run's prompts, losses and weights.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from piflow.runs import folder as run_folder
from tests.cluster.clusters import (
    Cluster,
    Inputs,
    JobRun,
    machine_environment,
    start_head,
)
from tests.cluster.machines import HOST, Machine, Network
from tests.faults.runs import SmallRun, require_equal, wait_until
from tests.servers import Server, free_ports

pytestmark = pytest.mark.timeout(1800)
STEPS = 18
CHECKPOINT_EVERY = 7
PACE = 2.0  # seconds a step, until what is to happen has happened
SECONDS = 1200  # until something has happened on a loaded machine
PASSWORD = "only-for-tests"
HEALTH = {  # a host that doesn't answer counts as dead after 8 s
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
EXIT_TRY_AGAIN = 75


def sections(**runtime: object) -> dict[str, dict[str, object]]:
    training = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "keep_last": 3}
    return {"training": training, "runtime": {"max_failures": 1, **runtime}}


def start(network: Network, workers: int = 1, **variables: str) -> tuple[Cluster, list[Machine]]:
    """A head on one host, and hosts with two logical CPUs each."""
    environment = machine_environment(**variables)
    cluster = start_head(network, environment)
    cluster.wait()
    return cluster, [cluster.worker(environment, cpus=2) for _ in range(workers)]


@pytest.fixture(scope="module")
def straight(inputs: Inputs, bridge: Network) -> SmallRun:
    """The run that nothing happens to."""
    run = JobRun(inputs.folder, inputs.recipe("straight-hosts", **sections()), {})
    cluster, _ = start(bridge)
    run.submit(cluster)
    run.succeed(SECONDS)
    bridge.clear()
    return run


def test_a_cut_link_costs_the_steps_since_the_checkpoint(
    inputs: Inputs, network: Network, straight: SmallRun
) -> None:
    """The head notices within seconds, the cut host ends by itself when it is back, another joins.

    The cut host's workers can write nothing in between: the object store is out of reach as well.
    """
    run = JobRun(inputs.folder, inputs.recipe("cut-link", **sections()), {}, PACE)
    cluster, [host] = start(network, **HEALTH)
    run.submit(cluster)
    wait_until(lambda: run.last_step() >= CHECKPOINT_EVERY + 1, "training", run, SECONDS)
    host.unplug()
    wait_until(lambda: "worker-failed" in run.names(), "noticed", run, SECONDS)
    host.plug()
    host.process.wait(300)
    cluster.worker(machine_environment(**HEALTH), cpus=2)
    run.succeed(SECONDS)
    assert ("resume", f"from step {CHECKPOINT_EVERY}") in run.events()
    require_equal(run, straight)
    assert run.losses() == straight.losses(), "to the bit"


@dataclass
class Redis(Server):
    """Where a head keeps what it must find again; as Debian ships it."""

    port: int = 0

    def __post_init__(self) -> None:
        [self.port] = free_ports(1)

    def command(self) -> list[str]:
        options = {
            "--bind": HOST, "--port": str(self.port), "--requirepass": PASSWORD,
            "--save": "", "--appendonly": "no", "--dir": str(self.folder),
        }  # fmt: skip
        return ["redis-server", *(word for pair in options.items() for word in pair)]

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        done = subprocess.run(
            ["redis-cli", "-h", HOST, "-p", str(self.port), "--no-auth-warning", "-a", PASSWORD,
             "ping"], capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        return done.stdout.strip() == "PONG"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path).running() as server:
        yield server


@dataclass
class HostRun(SmallRun):
    """A run whose driver is a process on a worker's host."""

    host: Machine | None = None

    def start(self) -> subprocess.Popen[bytes]:
        assert self.host is not None
        self.prepare()
        with (self.folder / f"{self.recipe.name}.log").open("ab") as log:
            return self.host.start(self.command, log, **self.environment)


def test_a_head_that_comes_back_with_its_redis_disturbs_nobody(
    inputs: Inputs, network: Network, straight: SmallRun, redis: Redis
) -> None:
    """As KubeRay sets GCS fault tolerance up: training goes on without a head, and after it."""
    variables = {
        "RAY_REDIS_ADDRESS": f"{HOST}:{redis.port}",
        "RAY_external_storage_namespace": "of-this-cluster",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    }
    environment = machine_environment(**variables)
    cluster = start_head(network, environment, redis_password=PASSWORD)
    cluster.wait()
    host = cluster.worker(environment, cpus=2)
    driver = {"RAY_ADDRESS": cluster.address}
    run = HostRun(inputs.folder, inputs.recipe("head-back", **sections()), driver, PACE, host)
    with run.running() as process:
        wait_until(lambda: run.last_step() >= CHECKPOINT_EVERY + 1, "training", run, SECONDS)
        cluster.head.kill()
        alone = run.last_step()
        wait_until(lambda: run.last_step() >= alone + 2, "on without a head", run, SECONDS)
        again = start_head(network, environment, cluster.head, redis_password=PASSWORD)
        again.wait()
        run.finish(process, SECONDS)
    assert len(run.lines()) == 2 * STEPS, "no step was repeated"
    assert not {"restart", "worker-failed", "controller-failed"} & set(run.names())
    require_equal(run, straight)


def test_a_head_that_is_gone_ends_the_driver_and_another_cluster_goes_on(
    inputs: Inputs, network: Network, straight: SmallRun
) -> None:
    """Without Redis, hosts end with their head; the driver says that another start helps."""
    variables = {"RAY_gcs_rpc_server_reconnect_timeout_s": "30"}
    cluster, [host] = start(network, **variables)
    driver = {"RAY_ADDRESS": cluster.address}
    run = HostRun(inputs.folder, inputs.recipe("head-gone", **sections()), driver, PACE, host)
    with run.running() as process:
        wait_until(lambda: run.last_step() >= CHECKPOINT_EVERY + 1, "training", run, SECONDS)
        cluster.head.kill()
        assert process.wait(300) == EXIT_TRY_AGAIN, run.log
    assert "head at" in run.log and "the newest checkpoint is good" in run.log
    saved = max(run_folder.checkpoints(run.recipe.run_dir))
    network.clear()
    cluster, [run.host] = start(network)
    run.environment, run.pace = {"RAY_ADDRESS": cluster.address}, 0
    with run.running() as process:
        run.finish(process, SECONDS)
    # workers go on without a head, and may be done before their machine ends
    assert saved == STEPS or ("resume", f"from step {saved}") in run.events()
    require_equal(run, straight)
    assert run.losses() == straight.losses(), "to the bit"
