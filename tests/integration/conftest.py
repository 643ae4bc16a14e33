"""One local Ray instance and one S3 server for the whole test session."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import AZURITE_KEY, KEYS, PLANTED, AzureServer, GcsServer, S3Server

REPOSITORY = Path(__file__).parents[2]


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


@pytest.fixture(scope="session")
def s3_keys() -> Iterator[None]:
    """The server's keys and others' secrets, set before Ray starts: its processes inherit them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, **PLANTED, "AZURE_STORAGE_KEY": AZURITE_KEY}.items():
            patch.setenv(name, value)
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
            address="local",  # not a cluster that somebody else has started on this machine
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


@pytest.fixture(autouse=True)
def _gives_its_cpus_back() -> Iterator[None]:
    """A test that leaves actors or placement groups behind fails itself, not those after it."""
    yield
    import ray

    if not ray.is_initialized():
        return
    gc.collect()  # Ray Data leaves an actor whose task has failed in a reference cycle
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"CPUs are still held by {_holders()}"
        time.sleep(0.2)


def _holders() -> list[str]:
    """The actors and placement groups that still hold resources."""
    from ray._private import state
    from ray.util import placement_group_table

    actors = [
        f"{actor['ActorClassName']} ({actor['State']})"
        for actor in state.actors().values()
        if actor["State"] != "DEAD"
    ]
    groups = [
        f"placement group {group['placement_group_id']} ({group['state']}, {group['bundles']})"
        for group in placement_group_table().values()
        if group["state"] != "REMOVED"
    ]
    return actors + groups


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, s3_keys: None) -> Iterator[S3Server]:
    """A running server that lives for the session: don't kill it."""
    with S3Server(tmp_path_factory.mktemp("s3")).running() as server:
        yield server


@pytest.fixture(scope="session")
def bucket(s3_server: S3Server) -> str:
    """URI of an empty folder in a bucket of a server that lives for the session."""
    return s3_server.uri


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    with GcsServer(tmp_path_factory.mktemp("gcs")).running() as server:
        yield server


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory, s3_keys: None) -> Iterator[AzureServer]:
    with AzureServer(tmp_path_factory.mktemp("azure")).running() as server:
        yield server


@pytest.fixture(scope="session", params=["s3", "gcs", "azure"])
def any_store(request: pytest.FixtureRequest) -> str:
    """URI of a folder in a bucket of each kind of object store."""
    server: S3Server | GcsServer | AzureServer = request.getfixturevalue(f"{request.param}_server")
    return server.uri
