"""Whether the driver that a file names is dead: only where its process could be seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from piflow.runs import lease
from piflow.runs.lease import Owner, RunTakenError, _parse, _take

REPOSITORY = Path(__file__).parents[3]
NOBODY = 2**22 + 1  # above the largest number that Linux gives

pytestmark = pytest.mark.skipif(not lease._kernel(), reason="needs Linux's /proc")


def test_a_living_process_is_not_dead() -> None:
    assert not Owner.this_process().was_killed_here


def test_a_dead_process_of_this_kernel_and_namespace_is_dead() -> None:
    process = subprocess.Popen(["sleep", "60"])
    theirs = replace(Owner.this_process(), pid=process.pid, started=lease._started(process.pid))
    assert not theirs.was_killed_here
    process.kill()
    deadline = time.monotonic() + 10
    while not theirs.was_killed_here and time.monotonic() < deadline:  # a zombie counts as dead
        time.sleep(0.01)
    assert theirs.was_killed_here
    process.wait()
    assert theirs.was_killed_here


def test_another_process_of_the_same_number_is_another_one() -> None:
    ours = Owner.this_process()
    assert replace(ours, started=ours.started - 1).was_killed_here


def test_a_new_owner_deletes_what_killed_processes_left_half_written(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".state.json.0a1b2c3d.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with lease.owned(str(tmp_path)):
        assert not left.exists()


@pytest.mark.parametrize("pid", [1, NOBODY])
@pytest.mark.parametrize("kind", ["pid", "boot", "unknown"])
def test_a_process_elsewhere_is_never_called_dead(kind: str, pid: int) -> None:
    """In another container on the same host, before a restart, or of a file that doesn't say."""
    ours = Owner.this_process()
    kernel = {
        "pid": ours.kernel.replace("pid:[", "pid:[9"),
        "boot": "another-boot " + ours.kernel.partition(" ")[2],
        "unknown": "",
    }[kind]
    assert kernel != ours.kernel
    assert not replace(ours, kernel=kernel, pid=pid, started=1).was_killed_here


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_in_another_namespace_of_processes_ours_is_not_called_dead() -> None:
    """The host has the same name, and there is no process of our number there."""
    code = (
        "import sys; from piflow.runs import lease; owner = lease._parse(sys.argv[1].encode()); "
        "print(owner.was_killed_here, lease._kernel() != owner.kernel)"
    )
    ours = Owner.this_process().to_json().decode()
    command = ["unshare", "-p", "-f", "--mount-proc", sys.executable, "-c", code, ours]
    found = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "unshare" in found.stderr and found.returncode:
        pytest.skip(f"no namespaces here: {found.stderr.strip()}")
    assert found.stdout.split() == ["False", "True"], found.stderr


def test_files_of_version_0_1_0_are_read() -> None:
    old = b'{"process": "x", "host": "h", "pid": 7, "since": "2026", "beat": 3}'
    assert _parse(old) == Owner("x", "h", 7, "2026", 3)
    later = json.loads(old) | {"more": 1}
    assert _parse(json.dumps(later).encode()) == Owner("x", "h", 7, "2026", 3)


@pytest.mark.parametrize(
    "change",
    [{"pid": "7"}, {"pid": True}, {"host": None}, {"beat": 1.5}, {"kernel": []}, {"started": "0"}],
)
def test_a_damaged_file_names_nobody(change: dict[str, Any]) -> None:
    damaged = asdict(Owner.this_process()) | change
    assert _parse(json.dumps(damaged).encode()) is None


def test_what_a_file_says_is_shown_escaped() -> None:
    text = str(replace(Owner.this_process(), host="a\x1b[2Jb"))
    assert "\x1b" not in text and r"a\x1b[2Jb" in text


@pytest.mark.parametrize("content", [b"{", b'{"pid": 1}', b"[]"])
def test_a_damaged_file_on_an_object_store_is_watched(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver may be alive: it is taken only when it hasn't changed for the lease's time."""
    versions = iter(["1", "2"])
    monkeypatch.setattr(lease.conditional, "read", lambda uri: (content, next(versions)))
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.0)
    with pytest.raises(RunTakenError, match="belongs to another driver"):
        _take("s3://bucket/run/driver.json", Owner.this_process())
