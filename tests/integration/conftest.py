"""One local Ray instance for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
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
