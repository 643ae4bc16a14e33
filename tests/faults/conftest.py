"""An S3 server that can be killed and come back, and an environment for real commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import cluster_environment, cluster_of, make_store
from tests.servers import KEYS, S3Server

REPOSITORY = Path(__file__).parents[2]


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
    with S3Server(tmp_path_factory.mktemp("s3")).running() as server:
        yield server


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """A cluster of one node with room for two workers, which outlives the runs on it."""
    with cluster_of(num_cpus=2) as cluster:
        yield cluster.address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, address: str) -> Path:
    """Inputs and embedding store of a module's small runs."""
    folder = tmp_path_factory.mktemp("runs")
    make_store(folder, cluster_environment(address))
    return folder
