"""A network of machines, and beside it what outlives every cluster: an object store and MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clusters import Inputs, ray_environment
from tests.cluster.machines import HOST, Network, network_of
from tests.faults.runs import SmallRun, embed, write_inputs
from tests.servers import KEYS, MlflowServer, S3Server


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Variables of the tests' own process, which talks to clusters and servers."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, **ray_environment(), "HOME": str(home)}.items():
            patch.setenv(name, value)
        for name in ("RAY_ADDRESS", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def bridge(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Iterator[Network]:
    with network_of(tmp_path_factory.mktemp("machines")) as network:
        yield network


@pytest.fixture
def network(bridge: Network) -> Iterator[Network]:
    """Without machines before and after the test."""
    yield bridge
    bridge.clear()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory, bridge: Network) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3"), host=HOST).running() as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    with MlflowServer(folder, s3=s3, host=HOST).running() as server:
        yield server


@pytest.fixture(scope="session")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, s3: S3Server, mlflow_server: MlflowServer
) -> Inputs:
    """A tiny model, prompts and their embedding store, on the object store."""
    folder: Path = tmp_path_factory.mktemp("runs")
    write_inputs(folder)
    inputs = Inputs(folder, s3.uri, mlflow_server.uri)
    inputs.upload()
    embed(SmallRun(folder, inputs.recipe("inputs"), dict(os.environ)))
    return inputs
