"""What piflow uses of Ray Train's insides is there; the first test to read after an upgrade."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import ray

from piflow.runtime import ray_private

TESTED = "2.60."  # pyproject.toml allows no other


def test_this_ray_is_the_one_whose_insides_are_known() -> None:
    assert ray.__version__.startswith(TESTED), (
        f"Ray {ray.__version__} is new to piflow/runtime/ray_private.py, which was written for "
        f"{TESTED}x: read the tests below, then change pyproject.toml and this number"
    )


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ray_private.WorkerGroup, "_start"),
        (ray_private.WorkerGroup, "has_started"),
        (ray_private.WorkerGroup, "shutdown"),
        (ray_private.WorkerGroup, "poll_status"),
        (ray_private.WorkerGroup, "get_workers"),
        (ray_private.ray_worker, "_global_node"),
        (ray_private.JobConfig(), "_py_driver_sys_path"),
        (ray_private.TrainController, "worker_group_cls"),
        (ray_private.ControllerCallback, "after_controller_start"),
        (ray_private.ControllerCallback, "before_controller_execute_resize_decision"),
        (ray_private.WorkerGroupCallback, "after_worker_group_start"),
        (ray_private.WorkerGroupCallback, "before_worker_group_shutdown"),
        (ray_private.WorkerGroupCallback, "after_worker_group_poll_status"),
    ],
)
def test_what_is_used_of_ray_train_is_there(owner: Any, name: str) -> None:
    assert hasattr(owner, name), f"Ray {ray.__version__} has no {owner}.{name}"


def test_our_callback_overrides_what_ray_train_calls() -> None:
    """Nobody would call a hook that Ray has renamed: every public method must be theirs."""
    ours = [name for name, _ in inspect.getmembers(ray_private.LifecycleCallback, callable)]
    own = {name for name in ours if name in vars(ray_private.LifecycleCallback)}
    hooks = {name for name in own if not name.startswith("_")}
    theirs = dir(ray_private.ControllerCallback) + dir(ray_private.WorkerGroupCallback)
    assert hooks and hooks <= set(theirs)
    for name in hooks:
        base = getattr(super(ray_private.LifecycleCallback, ray_private.LifecycleCallback), name)
        parameters = inspect.signature(getattr(ray_private.LifecycleCallback, name)).parameters
        assert list(parameters) == list(inspect.signature(base).parameters), name
