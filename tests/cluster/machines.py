"""Machines on this one, each a set of namespaces as a container has them.

    tests, S3, MLflow ── bridge 10.77.0.1 ──┬── eth0 10.77.0.2   the first machine
                                            ├── eth0 10.77.0.3   the second one
                                            └── …

A machine has an address, a hostname, processes, a home, a /tmp/ray and a /dev/shm of its own. The
rest of the disk is shared. Its first process has number 1: if that ends, all others are killed.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

HOST = "10.77.0.1"  # where the tests and their servers are found
_BRIDGE = "piflow0"
_BOOT = r"""set -e
mkdir -p "$FOLDER/ray" "$HOME" /tmp/ray
printf '127.0.0.1 localhost\n%s %s\n' "$ADDRESS" "$NAME" > "$FOLDER/hosts"
echo 'nameserver 127.0.0.1' > "$FOLDER/resolv.conf"  # nobody: names fail at once, not after 20 s
mount --bind "$FOLDER/ray" /tmp/ray
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o size=1g tmpfs /dev/shm
hostname "$NAME"
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
exec "$@"
"""


def run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


class Machine:
    """A running machine."""

    def __init__(
        self,
        number: int,
        name: str,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """Start it, with `command` as its first process.

        Args:
            folder: for what is its own; what it prints goes to `folder/log`.
            environment: all variables but HOME.
        """
        self.name, self.folder, self.number = name, folder, number
        self.address = f"10.77.0.{number}"
        self._environment = {**environment, "HOME": str(folder / "home")}
        self._wire = f"wire{number}"
        folder.mkdir()
        boot = {
            "FOLDER": str(folder), "ADDRESS": self.address, "NAME": name, "GATEWAY": HOST,
        }  # fmt: skip
        own = ["--pid", "--fork", "--mount-proc", "--net", "--uts", "--ipc", "--kill-child"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", *own, "sh", "-c", _BOOT, "boot", *command],
                env=self._environment | boot,
                stdout=log,
                stderr=log,
            )
        try:
            self._first = self._find_first()
            peer = ["type", "veth", "peer", "name", "eth0", "netns", str(self._first.pid)]
            run_ip("link", "add", self._wire, *peer)
            run_ip("link", "set", self._wire, "master", _BRIDGE, "up")
        except BaseException:
            self.kill()
            raise

    def _find_first(self) -> psutil.Process:
        """Its process number 1, as the tests see it."""
        parent = psutil.Process(self.process.pid)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if children := parent.children():
                return children[0]
            assert self.process.poll() is None, self.log
            time.sleep(0.01)
        raise TimeoutError(f"{self.name} has no process: {self.log}")

    @property
    def log(self) -> str:
        """The end of what its first process printed."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    @property
    def is_up(self) -> bool:
        return self.process.poll() is None

    def run(
        self, command: Sequence[str], seconds: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it, and wait for its end."""
        return subprocess.run(
            ["nsenter", "--target", str(self._first.pid), "--all", *command],
            env=self._environment | environment, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip

    def start(
        self, command: Sequence[str], log: IO[bytes], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a further command on it."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self._first.pid), "--all", *command],
            env=self._environment | environment, stdout=log, stderr=log,
        )  # fmt: skip

    def processes(self, word: str) -> list[psutil.Process]:
        """Those with the word in their command line."""
        found = []
        for process in self._first.children(recursive=True) if self.is_up else ():
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def unplug(self) -> None:
        """Cut its link: nothing comes in and nothing goes out any more, and nobody is told."""
        run_ip("link", "set", self._wire, "down")

    def plug(self) -> None:
        """Mend its link."""
        run_ip("link", "set", self._wire, "up")

    def terminate(self) -> None:
        """SIGTERM to its first process alone."""
        self._first.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """All its processes at once, as a power cut does."""
        self.process.kill()  # the kernel kills the first one with it, and the others with that
        self.process.wait(60)
        # it goes with the machine's network, but only after a while
        subprocess.run(["ip", "link", "delete", self._wire], capture_output=True, timeout=30)


def delete(pods: Iterable[Machine], grace: float) -> float:
    """As Kubernetes deletes pods: SIGTERM to their first processes, SIGKILL to all after `grace`.

    Returns:
        Seconds until the last one was gone.
    """
    pods, start = list(pods), time.monotonic()
    for pod in pods:
        pod.terminate()
    for pod in pods:
        try:
            pod.process.wait(max(0.0, start + grace - time.monotonic()))
        except subprocess.TimeoutExpired:
            pod.kill()
    return time.monotonic() - start


class Network:
    """The bridge between the machines, and the tests' own end of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(2)  # they are few enough for all addresses
        self._machines: list[Machine] = []

    def machine(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        instead_of: Machine | None = None,
    ) -> Machine:
        """A new machine, which ends with the network.

        Args:
            instead_of: one that has ended, whose address it takes over.
        """
        count = next(self._numbers)
        number = count if instead_of is None else instead_of.number
        folder = self._folder / f"{count}-{name}"
        machine = Machine(number, f"{name}-{count}", folder, command, environment)
        self._machines.append(machine)
        return machine

    def clear(self) -> None:
        """End all machines."""
        while self._machines:
            self._machines.pop().kill()


@contextmanager
def network_of(folder: Path) -> Iterator[Network]:
    """A network that is there while the block runs, in a network namespace of the tests' own."""
    assert os.environ.get("PIFLOW_ISOLATED"), (
        "these tests need namespaces of their own: make test-cluster, or "
        "tests/cluster/isolated python -m pytest tests/cluster/…"
    )
    run_ip("link", "add", _BRIDGE, "type", "bridge")
    network = Network(folder)
    try:
        run_ip("address", "add", f"{HOST}/24", "dev", _BRIDGE)
        run_ip("link", "set", _BRIDGE, "up")
        yield network
    finally:
        network.clear()
        run_ip("link", "delete", _BRIDGE)
