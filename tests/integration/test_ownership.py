"""Two drivers want one run's folder: on local disk and on real object stores."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from piflow import storage
from piflow.runs import lease
from piflow.runs.lease import Owner, RunTakenError, _Lease, owned, require_owner
from piflow.storage import conditional
from tests.servers import Server

pytestmark = pytest.mark.timeout(120)
REPOSITORY = Path(__file__).parents[2]
DRIVER = """
import sys, time
from piflow.runs import lease
lease.RENEW_SECONDS = 0.2
with lease.owned(sys.argv[1]):
    print(lease.PROCESS, flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3", "gcs", "azure"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server: Server = request.getfixturevalue(f"{request.param}_server")
    return storage.join(server.uri, tmp_path.name)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 6.0)


@contextmanager
def driver(run_dir: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that owns the folder, and what it calls itself."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, run_dir],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert name, process.communicate(timeout=20)[1]
        yield process, name
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_second_driver_is_refused_and_takes_over_from_a_killed_one(run_dir: str) -> None:
    with driver(run_dir) as (process, name):
        require_owner(run_dir, name)
        expected = rf"belongs to process {process.pid} on .*one driver at a time"
        with pytest.raises(RunTakenError, match=expected), owned(run_dir):
            pytest.fail("two drivers")
        require_owner(run_dir, name)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        began = time.monotonic()
        with owned(run_dir):
            assert time.monotonic() - began < lease.LEASE_SECONDS, "it died on this machine"
            require_owner(run_dir, lease.PROCESS)
            with pytest.raises(RunTakenError, match=f"belongs to process {os.getpid()}"):
                require_owner(run_dir, name)
    with owned(run_dir):  # given back, and taken again
        pass


def test_a_driver_of_another_machine_has_a_lease(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can see whether it is alive, so it is watched until its lease has run out."""
    run_dir = storage.join(bucket, tmp_path.name)
    uri = storage.join(run_dir, lease.OWNER_FILE)
    theirs = Owner("theirs", "another-machine", 1, "2026-01-01 00:00:00 UTC")
    assert conditional.write_if(uri, theirs.to_json(), None)
    began = time.monotonic()
    with owned(run_dir):
        assert time.monotonic() - began > lease.LEASE_SECONDS
        assert "process 1 on another-machine" in capsys.readouterr().out
        with pytest.raises(RunTakenError, match=f"belongs to process {os.getpid()}"):
            require_owner(run_dir, "theirs")
    assert conditional.read(uri) is None, "given back"


def test_a_driver_that_was_cut_off_is_told_and_ends(any_store: str, tmp_path: Path) -> None:
    """Another driver took over meanwhile; its file stays as it is."""
    run_dir = storage.join(any_store, tmp_path.name)
    uri = storage.join(run_dir, lease.OWNER_FILE)
    theirs = Owner("theirs", "another-machine", 1, "2026-01-01 00:00:00 UTC")
    with pytest.raises(RunTakenError, match="belongs to process 1 on another-machine"):
        with owned(run_dir) as ownership:
            ownership.require()
            while True:  # it renews its lease all the time
                found = conditional.read(uri)
                if found is not None and conditional.write_if(uri, theirs.to_json(), found[1]):
                    break
            deadline = time.monotonic() + 30
            while ownership.lost is None and time.monotonic() < deadline:
                time.sleep(0.1)
            with pytest.raises(RunTakenError, match="process 1 on another-machine"):
                ownership.require()
            with pytest.raises(RunTakenError, match="process 1"):
                require_owner(run_dir, lease.PROCESS)
    found = conditional.read(uri)
    assert found is not None and found[0] == theirs.to_json()
    conditional.delete_if(uri, found[1])


def test_of_many_drivers_at_once_one_remains(any_store: str, tmp_path: Path) -> None:
    """At the latest when leases are renewed: a store may let two writes of a moment pass."""
    uri = storage.join(any_store, tmp_path.name, lease.OWNER_FILE)
    start = threading.Barrier(6)

    def take(number: int) -> _Lease | None:
        owner = Owner(f"process {number}", "another-machine", number, "")
        start.wait(20)
        try:
            return _Lease(uri, owner, lease._take(uri, owner), lease.Ownership())
        except RunTakenError:
            return None

    with ThreadPoolExecutor(6) as pool:
        leases = [taken for taken in pool.map(take, range(6)) if taken is not None]
    remaining = []
    for taken in leases:
        try:
            taken._write()
        except RunTakenError:
            continue
        remaining.append(taken)
    [winner] = remaining
    found = conditional.read(uri)
    assert found == (winner.owner.to_json(), winner.version)
    conditional.delete_if(uri, winner.version)


def test_a_lost_answer_is_no_lost_lease(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write whose answer is lost is tried again, and meets its own object."""
    run_dir = storage.join(bucket, tmp_path.name)
    write = conditional.write_if

    def lossy(uri: str, content: bytes, version: str | None) -> None:
        write(uri, content, version)

    monkeypatch.setattr(conditional, "write_if", lossy)
    with owned(run_dir):
        time.sleep(1.5)
        require_owner(run_dir, lease.PROCESS)
    assert not storage.exists(storage.join(run_dir, lease.OWNER_FILE))


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner ended between opening and locking: somebody else may lock the file's successor."""
    path, lock, calls = tmp_path / lease.OWNER_FILE, fcntl.flock, []

    def late(file: IO[bytes], operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(operation)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with owned(str(tmp_path)):
        assert len(calls) == 2
        require_owner(str(tmp_path), lease.PROCESS)
        with pytest.raises(RunTakenError, match="belongs to process"), owned(str(tmp_path)):
            pytest.fail("two drivers")
    assert not path.exists()
