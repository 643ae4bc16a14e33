"""Ray itself: the running one, a cluster or a local instance."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from piflow.config import Recipe, RuntimeConfig

_ELASTIC_START_SECONDS = 30.0  # until workers have their places, on machines that are there

_DATA_CPUS = 2  # logical CPUs for Ray Data's reading beside the workers, on a local instance


@contextmanager
def ray_session(recipe: Recipe) -> Iterator[None]:
    """Use the running Ray, or the cluster in RAY_ADDRESS, or a local instance for this block."""
    import ray

    with _train_settings(recipe.runtime):
        if ray.is_initialized():
            yield
            return
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
        else:
            workers = int(recipe.runtime.max_workers * recipe.runtime.cpus_per_worker)
            encoders = recipe.embed.encoders[1] if recipe.embed.mode == "online" else 0
            ray.init(
                address="local",  # not a cluster that somebody else has started on this machine
                num_cpus=max(os.cpu_count() or 1, workers + encoders + _DATA_CPUS),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _train_settings(runtime: RuntimeConfig) -> Iterator[None]:
    """Ray Train's settings that it reads from the environment; a user's own come first."""
    start = runtime.worker_start_timeout
    if runtime.is_elastic:  # it counts machines that are going away, and looks again afterwards
        start = min(start, _ELASTIC_START_SECONDS)
    settings = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(runtime.stall_timeout),
    }
    absent = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]


def cluster_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
