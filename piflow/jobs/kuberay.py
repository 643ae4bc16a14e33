"""KubeRay's objects: a RayJob for each stage, and a RayCluster to develop on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from piflow.config import Recipe
from piflow.jobs import pods
from piflow.jobs.demand import Demand, Group, Stage, demand, job_name
from piflow.jobs.pods import Manifest
from piflow.jobs.values import KubernetesValues, Values

API = "ray.io/v1"
DEV = "dev"

_SUBMITTER_TRIES = 3  # it gives up while the head isn't ready yet


def ray_job(
    recipe: Recipe,
    values: Values,
    kubernetes: KubernetesValues,
    stage: Stage,
    overrides: Sequence[str],
) -> Manifest:
    """The RayJob of a stage: a cluster of its own, which ends with it.

    Raises:
        ValueError: as `demand` and `job_name`.
    """
    needed, limits = demand(recipe, values, stage), values.limits
    marks = pods.labels(run_name(recipe, values), job_name(recipe, values, stage), stage)
    spec: Manifest = {
        "entrypoint": entrypoint(stage, overrides, kubernetes),
        "submissionMode": "K8sJobMode",
        "backoffLimit": limits.retries,
        "activeDeadlineSeconds": round(limits.hours * 3600),
        "preRunningDeadlineSeconds": round(limits.start_minutes * 60),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": limits.keep_minutes * 60,
        "submitterConfig": {"backoffLimit": _SUBMITTER_TRIES},
        "submitterPodTemplate": pods.submitter_template(values, kubernetes, marks),
        "rayClusterSpec": _cluster_spec(values, kubernetes, marks, needed),
    }
    if needed.driver_gpus:
        spec["entrypointNumGpus"] = needed.driver_gpus
    return _object("RayJob", kubernetes, marks, spec)


def dev_cluster(recipe: Recipe, values: Values, kubernetes: KubernetesValues) -> Manifest:
    """A RayCluster that stays, with machines as training takes them, for jobs one after another.

    Raises:
        ValueError: as `demand` and `job_name`.
    """
    marks = pods.labels(run_name(recipe, values), job_name(recipe, values, DEV), DEV)
    needed = demand(recipe, values, "distill")
    spec = _cluster_spec(values, kubernetes, marks, needed)
    if kubernetes.redis is not None:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": kubernetes.redis.address,
            "redisPassword": {
                "valueFrom": {
                    "secretKeyRef": {
                        "name": kubernetes.redis.secret,
                        "key": kubernetes.redis.key,
                    }
                }
            },
        }
    return _object("RayCluster", kubernetes, marks, spec)


def run_name(recipe: Recipe, values: Values) -> str:
    """What the names of a run's jobs begin with."""
    return job_name(recipe, values, DEV).removesuffix(f"-{DEV}")


def entrypoint(stage: Stage, overrides: Sequence[str], kubernetes: KubernetesValues) -> str:
    """The shell command of the driver."""
    arguments = ["piflow", stage, f"{pods.RECIPE_FOLDER}/recipe.yaml", "--quiet"]
    for override in overrides:
        arguments += ["--set", override]
    command = shlex.join(arguments)
    if kubernetes.shared_folder is None:
        return command
    return f"cd {shlex.quote(kubernetes.shared_folder.path)} && exec {command}"


def _cluster_spec(
    values: Values, kubernetes: KubernetesValues, marks: dict[str, str], needed: Demand
) -> Manifest:
    idle = round(values.limits.idle_minutes * 60)
    return {
        "rayVersion": values.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": idle,
            "securityContext": pods.container_security(),
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "500m", "memory": "1Gi"},
            },
        },
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
            "template": pods.head_template(values, kubernetes, marks),
        },
        "workerGroupSpecs": [
            _worker_group(values, kubernetes, marks, group, idle) for group in needed.groups
        ],
    }


def _worker_group(
    values: Values, kubernetes: KubernetesValues, marks: dict[str, str], group: Group, idle: int
) -> Manifest:
    """CPUs and GPUs are named to Ray, which doesn't see those of every kind of allocation."""
    return {
        "groupName": group.name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": group.most,
        "idleTimeoutSeconds": idle,
        "rayStartParams": {"num-cpus": str(group.cpus), "num-gpus": str(group.gpus)},
        "template": pods.worker_template(values, kubernetes, marks, group),
    }


def _object(
    kind: str, kubernetes: KubernetesValues, marks: dict[str, str], spec: Manifest
) -> Manifest:
    metadata = {
        "name": marks["app.kubernetes.io/instance"],
        "namespace": kubernetes.namespace,
        "labels": dict(marks),
    }
    return {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}
