"""The workers that a recipe asks Ray for: room, places, collectives, and how their end is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from piflow.config import Recipe, RuntimeConfig
from piflow.data.cluster import require_resources
from piflow.runtime.exits import WorkersFailedError, WorkersLostError
from piflow.runtime.session import ray_session


@contextmanager
def session_with_room(
    recipe: Recipe, *, key: str = "runtime.num_workers", encodes: bool = True
) -> Iterator[None]:
    """Ray, with room for the workers and online mode's encoders, be it the fewest of them.

    Args:
        key: the recipe's, that says how many workers there are.
        encodes: whether online mode's encoders run beside them.

    Raises:
        ResourcesError: there is none within `runtime.worker_start_timeout`.
    """
    runtime, embed = recipe.runtime, recipe.embed
    what, keys = "the workers", f"{key}, runtime.use_gpu, runtime.cpus_per_worker"
    bundles = [resources(runtime)] * runtime.worker_range[0]
    if encodes and embed.mode == "online":
        what, keys = "the workers and encoders", f"{keys}, embed.encoders, gpus_per_encoder"
        bundles += [{"CPU": 1, "GPU": embed.gpus_per_encoder}] * embed.encoders[0]
    with ray_session(recipe):
        require_resources(bundles, what=what, keys=keys, timeout=runtime.worker_start_timeout)
        yield


def resources(runtime: RuntimeConfig) -> dict[str, float]:
    """Of a worker, by Ray's names."""
    needed: dict[str, float] = {"CPU": runtime.cpus_per_worker}
    if runtime.use_gpu:
        needed["GPU"] = 1
    return needed


def collectives(runtime: RuntimeConfig) -> str:
    """torch.distributed's backend."""
    if not runtime.use_gpu:
        return "gloo"
    # gradients that lie in host memory are clipped there
    return "cpu:gloo,cuda:nccl" if runtime.offload == "cpu" else "nccl"


def scaling(runtime: RuntimeConfig, resize_interval: float) -> Any:
    """Ray Train's `ScalingConfig`; `resize_interval` in seconds, between looks for more room."""
    import ray.train

    # a pair makes Ray Train elastic, which its declared types don't know
    workers: Any = runtime.worker_range if runtime.is_elastic else runtime.max_workers
    interval: dict[str, Any] = {"elastic_resize_monitor_interval_s": resize_interval}
    return ray.train.ScalingConfig(
        num_workers=workers,
        use_gpu=runtime.use_gpu,
        resources_per_worker=resources(runtime),
        **interval,
    )


def failed(error: Any) -> WorkersFailedError:
    """What to raise for Ray Train's `WorkerGroupError`: whether workers failed or were lost."""
    from piflow.runtime.ray_private import first_failure, is_of_system

    lost = all(is_of_system(failure) for failure in error.worker_failures.values())
    kind = WorkersLostError if lost else WorkersFailedError
    return kind(first_failure(error.worker_failures))
