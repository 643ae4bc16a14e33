"""From zero to a registered model and back to zero: the emoji recipe, made small, as a job.

Ray's own stand-in for a cloud starts the machines: processes beside the head's. Everything else is
real: the autoscaler (both versions), the job, the object store, MLflow.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from piflow import storage
from piflow.runs import folder as run_folder
from tests.cluster.clusters import Cluster, Inputs, JobRun, machine_environment, start_head
from tests.cluster.machines import Network
from tests.faults.runs import wait_until

pytestmark = pytest.mark.timeout(1800)
IDLE_MINUTES = 0.3
_HEAD_ID = (
    "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as Ray's stand-in expects it
)
_PIFLOW = [sys.executable, "-c", "from piflow.cli import main; main()"]


def scaling(v2: bool) -> dict[str, Any]:
    """What Ray's autoscaler reads: machines of one logical CPU, none at first, two at most."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    if v2:
        provider |= {"launch_multiple": True, "head_node_id": _HEAD_ID}
    worker = {
        "resources": {"CPU": 1, "object_store_memory": 100 * 2**20},
        "node_config": {}, "min_workers": 0, "max_workers": 2,
    }  # fmt: skip
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "from-zero",
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        "cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": [],
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
        "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


def start(network: Network, folder: Path, v2: bool) -> Cluster:
    file = folder / "scaling.json"
    file.write_text(json.dumps(scaling(v2)))
    environment = machine_environment(RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1")
    if v2:
        environment |= {
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            "RAY_enable_autoscaler_v2": "1",
        }  # fmt: skip
    cluster = start_head(network, environment, autoscaling_config=str(file))
    cluster.wait()
    return cluster


def machines(cluster: Cluster) -> int:
    """How many there are beside the head."""
    raylets = cluster.head.processes("raylet/raylet ")
    numbers = {process.pid for process in raylets}  # one that starts a worker is two for a moment
    return sum(_parent(process) not in numbers for process in raylets) - 1


def _parent(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.Error:
        return None


class Stages(JobRun):
    """All of piflow's stages, one after another in one job."""

    @property
    def command(self) -> list[str]:
        recipe = str(self.recipe_file)
        stages = [
            shlex.join([*_PIFLOW, stage, recipe, *options])
            for stage, options in (
                ("embed", ["--quiet"]), ("distill", ["--quiet"]), ("evaluate", ["--quiet"]),
                ("export", []),
            )
        ]  # fmt: skip
        return ["/bin/sh", "-c", " && ".join(stages)]


@pytest.mark.parametrize("version", [1, 2])
def test_from_zero_to_a_registered_model_and_back(
    version: int, inputs: Inputs, network: Network, tmp_path: Path
) -> None:
    training = {"steps": 4, "checkpoint_every": 2}
    evaluation = {"prompts": 2, "seeds": 2, "teacher_steps": 5}
    embed = {"store": str(inputs.folder / f"store-{version}")}
    name = f"from-zero-{version}"
    recipe = inputs.recipe(name, training=training, evaluation=evaluation, embed=embed)
    run = Stages(inputs.folder, recipe, {})
    cluster = start(network, tmp_path, v2=version == 2)
    assert machines(cluster) == 0
    run.submit(cluster)
    began = time.monotonic()
    most = 0

    def ended() -> str | None:
        nonlocal most
        most = max(most, machines(cluster))
        return run.ended()

    assert wait_until(ended, "at the end", run, 1200) == "SUCCEEDED", run.log
    worked = time.monotonic()
    wait_until(lambda: machines(cluster) == 0, "back to zero", run, 300)
    print(f"{worked - began:.0f} s of work, back to zero {time.monotonic() - worked:.0f} s later")
    assert most == 2
    assert run.status() == "FINISHED"
    assert max(run_folder.checkpoints(recipe.run_dir)) == 4
    client, run_id = run._client()
    [model] = client.search_model_versions(f"name='{recipe.tracking.model_name or name}'")
    assert model.run_id == run_id
    assert "eval/psnr_gain_db" in client.get_run(run_id).data.metrics
    for file in ("evaluation/report.html", "evaluation/grid.jpg"):
        assert storage.exists(storage.join(recipe.run_dir, *file.split("/")))
    assert storage.list_files(storage.join(recipe.run_dir, "adapter"))
