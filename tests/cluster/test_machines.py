"""The tests' own machines: what they share, what they don't, and how they end."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import psutil

from tests.cluster.machines import Machine, Network, delete
from tests.faults.runs import wait_until

_SERVE = [sys.executable, "-m", "http.server", "8000"]
_STUBBORN = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def answers(machine: Machine) -> bool:
    try:
        with urllib.request.urlopen(f"http://{machine.address}:8000", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_machines_have_the_same_ports_and_links_of_their_own(network: Network) -> None:
    first, second = (network.machine("server", _SERVE, _ENVIRONMENT) for _ in range(2))
    wait_until(lambda: answers(first) and answers(second), "serving", seconds=60)
    first.unplug()
    assert not answers(first) and answers(second)
    first.plug()
    wait_until(lambda: answers(first), "back", seconds=60)


def test_a_machine_has_a_name_processes_and_folders_of_its_own(network: Network) -> None:
    first, second = (network.machine("sleeper", ["sleep", "600"], _ENVIRONMENT) for _ in range(2))
    wait_until(lambda: first.run(["hostname"]).stdout.strip() == first.name, "up", seconds=60)
    script = "touch /tmp/ray/mine /dev/shm/mine; hostname -i; ps -e | grep -c sleep"
    address, sleepers = first.run(["sh", "-c", script]).stdout.split()
    assert address == first.address and sleepers == "1"
    assert (first.folder / "ray" / "mine").exists()
    assert second.run(["sh", "-c", "ls /tmp/ray /dev/shm"]).stdout.count("mine") == 0
    assert not Path("/dev/shm/mine").exists()


def test_deleted_pods_get_their_grace_and_then_end_with_all_that_they_started(
    network: Network,
) -> None:
    polite = network.machine(
        "polite", ["sh", "-c", "trap 'exit 0' TERM; sleep 600 & wait"], _ENVIRONMENT
    )
    stubborn = network.machine("stubborn", _STUBBORN, _ENVIRONMENT)
    for machine in (polite, stubborn):
        wait_until(lambda machine=machine: machine.processes("sleep"), "up", seconds=60)
    children = [*polite.processes("sleep"), *stubborn.processes("sleep")]
    assert 2 <= delete([polite, stubborn], grace=2) < 60
    assert polite.process.returncode == 0 and stubborn.process.returncode < 0
    _, alive = psutil.wait_procs(children, 30)
    assert not alive


def test_a_machine_takes_over_an_address(network: Network) -> None:
    first = network.machine("server", _SERVE, _ENVIRONMENT)
    wait_until(lambda: answers(first), "serving", seconds=60)
    first.kill()
    second = network.machine("server", _SERVE, _ENVIRONMENT, instead_of=first)
    assert second.address == first.address and second.name != first.name
    wait_until(lambda: answers(second), "serving", seconds=60)
