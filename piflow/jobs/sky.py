"""A SkyPilot task: Ray on all of its machines, by `ray symmetric-run`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from piflow.config import Recipe
from piflow.jobs.demand import Demand, require_reachable
from piflow.jobs.kuberay import run_name
from piflow.jobs.machines import SkyValues
from piflow.jobs.values import Values

_PORT = 6390  # SkyPilot has a Ray of its own on 6380
_RECIPE = "~/piflow/recipe.yaml"


def task(
    recipe: Recipe, values: Values, sky: SkyValues, needed: Demand, overrides: Sequence[str]
) -> dict[str, Any]:
    """The task, as YAML has it; the variable STAGE says which stage.

    Raises:
        ValueError: places of the recipe aren't reached from all machines, or the values name no
            kind of GPU for a recipe that needs some.
    """
    require_reachable(recipe, None)
    group = needed.groups[0]
    resources: dict[str, Any] = {
        "infra": sky.infra,
        "image_id": f"docker:{values.image}",
        "cpus": f"{group.cpus}+",
        "memory": f"{group.memory_gib}+",
        "disk_size": sky.disk_gb,
        "use_spot": sky.market == "spot",
        "autostop": {"idle_minutes": round(values.limits.idle_minutes), "down": True},
    }
    if group.gpus:
        if sky.accelerator is None:
            raise ValueError(
                f"the recipe needs {group.gpus} GPU(s) a machine, and sky.accelerator is empty; "
                "name their kind, e.g. H100"
            )
        resources["accelerators"] = f"{sky.accelerator}:{group.gpus}"
    document: dict[str, Any] = {
        "name": run_name(recipe, values),
        "num_nodes": group.most,
        "resources": resources,
        "envs": {"STAGE": "distill", **values.environment},
        "file_mounts": {_RECIPE: "./recipe.yaml"},
        "run": _run(values, group.cpus, group.gpus, overrides),
    }
    document["secrets"] = {name: None for name in ("RAY_AUTH_TOKEN", *sky.secrets)}
    return document


def _run(values: Values, cpus: int, gpus: int, overrides: Sequence[str]) -> str:
    """On every machine; the first is Ray's head and runs the driver."""
    driver = ["piflow", '"$STAGE"', _RECIPE, "--quiet"]
    driver += [shlex.quote(part) for override in overrides for part in ("--set", override)]
    lines = [
        "set -euo pipefail",
        "export RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600",
        f"export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={values.saving_seconds}",
        'head="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
        f'ray symmetric-run --address "$head:{_PORT}" --min-nodes "$SKYPILOT_NUM_NODES" \\',
        f"  --num-cpus={cpus} --num-gpus={gpus} \\",
        f'  -- env RAY_ADDRESS="$head:{_PORT}" {" ".join(driver)}',
    ]
    return "\n".join(lines) + "\n"
