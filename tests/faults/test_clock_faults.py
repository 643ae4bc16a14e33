"""The clock is wrong by an hour where an object store is used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from piflow import storage
from tests.servers import S3Server

pytestmark = pytest.mark.timeout(900)
_LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is written into this file is added to the time of processes that are started."""
    if not _LIBRARIES:
        pytest.skip("libfaketime isn't installed: apt-get install faketime")
    file = tmp_path_factory.mktemp("clock") / "offset"
    file.write_text("+0\n")
    variables = {
        "LD_PRELOAD": str(_LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # it is the wall clock that jumps
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield file


@pytest.mark.parametrize("offset", ["+1h", "-1h"])
def test_a_wrong_clock_and_s3(offset: str, clock: Path, s3_server: S3Server) -> None:
    """Promise: data goes on, its client finds the difference; what can't says what is wrong."""
    uri = storage.join(s3_server.uri, "clock")
    script = f"""
from piflow import storage
from piflow.storage import conditional
storage.write_bytes({uri!r}, b'1')
assert storage.read_bytes({uri!r}) == b'1'
conditional.read({uri!r})
"""
    clock.write_text(f"{offset}\n")
    began = time.monotonic()
    try:
        result = subprocess.run(
            [sys.executable, "-c", script], env=dict(os.environ), capture_output=True, text=True
        )
    finally:
        clock.write_text("+0\n")
    expected = "RequestTimeTooSkewed: this machine's clock is more than 15 minutes from the store's"
    assert "PermissionError" in result.stderr and expected in result.stderr
    assert time.monotonic() - began < 60
