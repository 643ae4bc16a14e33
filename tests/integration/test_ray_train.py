"""Ray Train's life cycle with our callbacks, without a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKERS, CPUS = 2, 2.0  # together all that the session's Ray has room for


class _DiesOnce:
    """A train function whose arrival ends the first worker that it comes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        """Never: what arrives is `_train`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.folder,)


def _arrive(folder: Path) -> Callable[[], None]:
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return _train
    os._exit(1)


def _train() -> None:
    import ray.train

    assert ray.train.get_context().get_world_size() == WORKERS


@pytest.mark.timeout(240)
def test_a_worker_that_dies_while_starting_leaves_its_places(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Ray Train gives up there; the next attempt must find the cluster's CPUs free."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from piflow.runtime.mailbox import start_mailbox
    from piflow.runtime.ray_private import LifecycleCallback

    def attempt() -> None:
        TorchTrainer(
            _DiesOnce(tmp_path),
            scaling_config=ray.train.ScalingConfig(
                num_workers=WORKERS, resources_per_worker={"CPU": CPUS}
            ),
            run_config=ray.train.RunConfig(
                storage_path=str(tmp_path), callbacks=[LifecycleCallback(start_mailbox(), 60.0)]
            ),
        ).fit()

    with pytest.raises(ray.train.ControllerError, match="actor died"):
        attempt()
    attempt()
