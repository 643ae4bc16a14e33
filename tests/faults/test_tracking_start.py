"""Runs that are started together with one new SQLite store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from piflow.runs.tracking import start
print("run", start(sys.argv[1], "together", sys.argv[2], {}, {}))
"""


@pytest.mark.timeout(600)
def test_runs_that_are_started_together_share_a_new_database(tmp_path: Path) -> None:
    """MLflow makes the tables of a new database; only one process may."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, uri, f"run-{number}"],
            env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    ends = [(*process.communicate(timeout=500), process.returncode) for process in processes]
    assert [code for *_, code in ends] == [0] * 3, ends
    assert len({out for out, *_ in ends}) == 3
