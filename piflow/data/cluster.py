"""Whether Ray's cluster has room for what is about to be started.

Ray itself waits without end, and in silence, for a resource that no machine of the cluster has.
Here a placement group asks for it first: an autoscaler sees the same demand that the actors or
workers will make, and what it started is there for them when the group is given back.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

_PATIENCE_SECONDS = 3.0  # until a place that is free is found

_POLL_SECONDS = 1.0  # how long a signal may have to wait


class ResourcesError(TimeoutError):
    """The cluster has no room for what was asked for; the message says what there is."""


def require_resources(
    bundles: Sequence[Mapping[str, float]], *, what: str, keys: str, timeout: float
) -> None:
    """Wait until the cluster has room for all bundles at once; say at once if it hasn't.

    An instance that this machine started for itself (no ``RAY_ADDRESS``) is waited for only while
    something else uses what is needed: no machine will join it.

    Args:
        bundles: what each actor or worker needs: Ray's name of the resource -> amount. Each of them
            must find its place on one machine.
        what: who needs it, for the message (``"an encoder"``).
        keys: the recipe's keys that say so (``"embed.gpus_per_encoder"``).
        timeout: seconds that an autoscaler has to bring machines.

    Raises:
        ResourcesError: no room; names what is asked and what there is.
    """
    from ray.util import placement_group, remove_placement_group

    wanted = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    wanted = [bundle for bundle in wanted if bundle]
    if not wanted:
        return
    group = placement_group(wanted, strategy="PACK")
    try:
        if _ready(group, _PATIENCE_SECONDS):
            return
        # Ray Data leaves an actor whose task has failed in a reference cycle of its executor's, and
        # the actor keeps its CPUs and GPU until this process's garbage collector happens to run.
        gc.collect()
        asked = f"{what} asked for {_described(wanted)} ({keys})"
        if not os.environ.get("RAY_ADDRESS") and not _fits_this_machine(wanted):
            raise ResourcesError(
                f"{asked}; {_what_there_is()}. This Ray is this machine's alone, and none will "
                "join it: set RAY_ADDRESS to a cluster that has room, or ask for less"
            )
        print(
            f"{asked}; {_what_there_is()}: waiting up to {timeout:.0f} s for room",
            flush=True,
        )
        if not _ready(group, timeout):
            raise ResourcesError(
                f"{asked}, and for {timeout:.0f} s (runtime.worker_start_timeout) there was no "
                f"room; {_what_there_is()}. Add machines, wait for other jobs to end, or ask for "
                "less"
            )
    finally:
        remove_placement_group(group)


def _fits_this_machine(bundles: Sequence[Mapping[str, float]]) -> bool:
    """Whether the cluster, of one machine, would have room if nothing else ran on it."""
    import ray

    whole = ray.cluster_resources()
    names = {name for bundle in bundles for name in bundle}
    return all(
        sum(bundle.get(name, 0.0) for bundle in bundles) <= whole.get(name, 0.0) for name in names
    )


def _ready(group: Any, seconds: float) -> bool:
    """Whether the placement group has its places within so many seconds."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if group.wait(timeout_seconds=min(left, _POLL_SECONDS)):
            return True
    return False


def _described(bundles: Sequence[Mapping[str, float]]) -> str:
    """``2 x {CPU: 1, GPU: 1}``, equal bundles together."""
    texts = [_amounts(bundle) for bundle in bundles]
    return " and ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))


def _what_there_is() -> str:
    """Every machine's resources, and what is free of them all."""
    import ray

    names = ("CPU", "GPU")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = _described([{name: node.get(name, 0.0) for name in names} for node in nodes])
    free = ray.available_resources()
    return (
        f"the cluster has {machines or 'no machine'}, of which "
        f"{_amounts({name: free.get(name, 0.0) for name in names})} is free"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in resources.items()) + "}"
