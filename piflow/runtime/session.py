"""Ray itself: the running one, a cluster or a local instance."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from piflow.config import Recipe, RuntimeConfig
from piflow.runtime.environment import worker_setup
from piflow.runtime.exits import RayLostError, is_ray_lost
from piflow.runtime.signals import StoppedError, kept_handlers

_ELASTIC_START_SECONDS = 30.0  # until workers have their places, on machines that are there

_CONNECT_SECONDS = 10.0

_DATA_CPUS = 2  # logical CPUs for Ray Data's reading beside the workers, on a local instance


@contextmanager
def ray_session(recipe: Recipe) -> Iterator[None]:
    """Use the running Ray, or the cluster in RAY_ADDRESS, or a local instance for this block.

    Ray stays connected to a cluster that was lost: to part from a head that is gone takes its
    client two minutes, and can crash this process.
    """
    import ray

    with _train_settings(recipe.runtime):
        if ray.is_initialized():
            yield
            return
        _start(recipe)
        is_lost = False
        try:
            yield
        except (RayLostError, StoppedError) as error:
            is_lost = is_ray_lost(error) and bool(os.environ.get("RAY_ADDRESS"))
            raise
        finally:
            if not is_lost:
                ray.shutdown()


def leave_lost_cluster(code: int) -> None:
    """End the process at once if it is still connected to a cluster that is gone.

    At the interpreter's end Ray's client would try to part from the head, see `ray_session`.
    """
    import ray

    if ray.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start(recipe: Recipe) -> None:
    """Connect to the cluster, or start an instance that ends with this process.

    Raises:
        ConnectionError: there is no cluster at the address.
        PermissionError: it wants another token.
    """
    import ray

    from piflow.runtime.ray_private import job_config

    _require_cluster(os.environ.get("RAY_ADDRESS", ""))
    with _token_explained(), kept_handlers():
        if os.environ.get("RAY_ADDRESS"):
            hook = worker_setup(os.environ)
            ray.init(
                job_config=job_config(),
                log_to_driver=False,
                runtime_env=None if hook is None else {"worker_process_setup_hook": hook},
            )
        else:
            workers = int(recipe.runtime.max_workers * recipe.runtime.cpus_per_worker)
            encoders = recipe.embed.encoders[1] if recipe.embed.mode == "online" else 0
            ray.init(
                address="local",  # not a cluster that somebody else has started on this machine
                num_cpus=max(os.cpu_count() or 1, workers + encoders + _DATA_CPUS),
                include_dashboard=False,
                job_config=job_config(),
                log_to_driver=False,
                logging_level=logging.WARNING,
            )


@contextmanager
def _token_explained() -> Iterator[None]:
    """Tell a refused token from a cluster that is away, which Ray doesn't.

    Raises:
        PermissionError: it is the token.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, ConnectionError) as error:
        if AuthenticationError.__name__ not in f"{error!r} {error.__cause__}":
            raise
        place = os.environ.get("RAY_ADDRESS")
        whose = f"the cluster at RAY_ADDRESS={place}" if place else "a Ray of this machine's own"
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise PermissionError(
            f"{whose} didn't take this process's token; expected the cluster's own in "
            "RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token, "
            f"and RAY_AUTH_MODE=token, which is {mode}"
        ) from error


def _require_cluster(address: str) -> None:
    """Make sure that somebody listens there, which Ray's client waits minutes for.

    Raises:
        ConnectionError: nobody does.
    """
    from piflow.runtime.alive import is_listening

    place = address.removeprefix("ray://")
    if ":" not in place or is_listening(place, _CONNECT_SECONDS):
        return  # "auto" names no place
    raise ConnectionError(
        f"nobody listens at RAY_ADDRESS={address}; expected the address that `ray start --head` "
        "printed on the cluster's head (port 6379 unless chosen). Start the cluster, correct the "
        "address, or unset RAY_ADDRESS to use this machine alone"
    )


@contextmanager
def _train_settings(runtime: RuntimeConfig) -> Iterator[None]:
    """Ray Train's settings that it reads from the environment; a user's own come first."""
    settings = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_start_seconds(runtime)),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(runtime.stall_timeout),
    }
    absent = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]


def _start_seconds(runtime: RuntimeConfig) -> float:
    """Of one try to get the workers' places."""
    if runtime.is_elastic:  # it counts machines that are going away, and looks again afterwards
        return min(runtime.worker_start_timeout, _ELASTIC_START_SECONDS)
    return runtime.worker_start_timeout


def start_tries(runtime: RuntimeConfig) -> int:
    """How often Ray Train tries again to get the workers' places, before it gives up."""
    return round(runtime.worker_start_timeout / _start_seconds(runtime)) - 1


def cluster_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
