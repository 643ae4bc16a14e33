"""A cluster with token authentication serves nobody without its token, whatever the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.clusters import REPOSITORY, Cluster, machine_environment, start_head
from tests.cluster.machines import Network

pytestmark = pytest.mark.timeout(1200)
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_PIFLOW = [sys.executable, "-c", "from piflow.cli import main; main()"]
_RECIPE = str(REPOSITORY / "pipelines" / "recipes" / "emoji-flux.yaml")
_SECONDS = 300  # of a command on a loaded machine
OTHERS = {
    "without": {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""},
    "wrong": {"RAY_AUTH_TOKEN": "f" * 32},
}


@pytest.fixture(scope="module")
def cluster(bridge: Network) -> Iterator[Cluster]:
    cluster = start_head(bridge, machine_environment())
    cluster.wait()
    yield cluster
    bridge.clear()


def commands(cluster: Cluster, overrides: list[str]) -> dict[str, list[str]]:
    """Of Ray and piflow, all that speak to a cluster."""
    jobs, gcs = ["--address", cluster.dashboard], ["--address", cluster.address]
    node = "0" * 56
    return {
        "ray status": [*_RAY, "status", *gcs],
        "ray list nodes": [*_RAY, "list", "nodes", *jobs],
        "ray drain-node": [
            *_RAY, "drain-node", *gcs, "--node-id", node, "--reason-message", "x",
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "9",
        ],
        "ray start": [*_RAY, "start", *gcs, "--num-cpus", "1", "--block"],
        "ray job submit": [*_RAY, "job", "submit", *jobs, "--no-wait", "--", "echo", "planted"],
        "ray job list": [*_RAY, "job", "list", *jobs],
        "ray job logs": [*_RAY, "job", "logs", *jobs, "victim"],
        "ray job stop": [*_RAY, "job", "stop", *jobs, "victim"],
        "ray job delete": [*_RAY, "job", "delete", *jobs, "victim"],
        "piflow embed": [*_PIFLOW, "embed", _RECIPE, *overrides],
        "piflow smoke": [*_PIFLOW, "smoke", _RECIPE],
    }  # fmt: skip


@pytest.fixture(scope="module")
def outputs(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """What each command says to a stranger on another machine, by (command, token)."""
    machine = cluster.network.machine("stranger", ["sleep", "infinity"], machine_environment())
    folder = tmp_path_factory.mktemp("embed")
    (folder / "prompts.txt").write_text("a red heart\n")

    def overrides(token: str) -> list[str]:
        keys = {"run_dir": folder / token / "run", "embed.store": folder / token / "store"}
        keys |= {"embed.prompts": folder / "prompts.txt"}
        return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]

    cluster.jobs.submit_job(entrypoint="sleep 3600", submission_id="victim")

    def outcome(key: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        command = commands(cluster, overrides(key[1]))[key[0]]
        return machine.run(command, _SECONDS, **OTHERS[key[1]], RAY_ADDRESS=cluster.address)

    keys_of_all = [(name, token) for name in commands(cluster, []) for token in OTHERS]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(keys_of_all, pool.map(outcome, keys_of_all), strict=True))


def test_strangers_are_refused_whatever_the_command(
    outputs: dict[tuple[str, str], subprocess.CompletedProcess[str]], cluster: Cluster
) -> None:
    """They are told that it is the token; nothing was started, and nothing ended."""
    let_in = {
        key: done.stdout + done.stderr
        for key, done in outputs.items()
        if done.returncode == 0 or "token" not in (done.stdout + done.stderr).lower()
    }
    assert not let_in
    assert [job.submission_id for job in cluster.jobs.list_jobs()] == ["victim"]
    assert cluster.jobs.get_job_status("victim").value in ("PENDING", "RUNNING")


@pytest.mark.parametrize("token", list(OTHERS))
@pytest.mark.parametrize("command", ["piflow embed", "piflow smoke"])
def test_piflow_says_so_in_a_line(
    command: str,
    token: str,
    outputs: dict[tuple[str, str], subprocess.CompletedProcess[str]],
) -> None:
    done = outputs[command, token]
    [line] = [line for line in done.stderr.splitlines() if line.startswith("piflow: ")]
    assert done.returncode == 1
    assert "RAY_AUTH_TOKEN" in line and "Traceback" not in done.stderr


def test_the_token_lets_in(cluster: Cluster) -> None:
    """The same commands, so that a refusal is the token's."""
    for name in ("ray status", "ray list nodes", "ray job list", "ray job logs"):
        machine = cluster.head
        done = machine.run(commands(cluster, [])[name], _SECONDS)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
