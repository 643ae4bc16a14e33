"""Pod templates of Ray's head and workers, and of the pod that submits a job."""

from __future__ import annotations

from typing import Any

from piflow.jobs.demand import Group
from piflow.jobs.values import KubernetesValues, Machine, Toleration, Values

Manifest = dict[str, Any]

HEAD_ACCOUNT, WORKER_ACCOUNT, PRIORITY_CLASS = "piflow-head", "piflow-worker", "piflow-training"
RECIPE_FOLDER = "/etc/piflow"
DASHBOARD_PORT, AGENT_PORT, METRICS_PORT = 8265, 52365, 8080

_USER = 1000  # of the image
_SHM_SHARE = 0.4  # of the memory: Ray's object store takes 0.3, NCCL and loaders some more
_STAY = {  # to those who would move pods to save machines
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
_KILL_SECONDS = 30  # after what was saved, for Ray's own processes to end


def labels(run: str, job: str, stage: str) -> dict[str, str]:
    """What disruption budget, network policy and overlays select by."""
    return {
        "app.kubernetes.io/name": "piflow",
        "app.kubernetes.io/part-of": run,
        "app.kubernetes.io/instance": job,
        "app.kubernetes.io/component": stage,
    }


def config_map(marks: dict[str, str]) -> str:
    """Name of the ConfigMap with the run's recipe."""
    return f"{marks['app.kubernetes.io/part-of']}-recipe"


def security() -> Manifest:
    """Of a pod: no root, and the container runtime's own filter of system calls."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """Of a container: no more rights than its user has."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def head_template(values: Values, kubernetes: KubernetesValues, marks: dict[str, str]) -> Manifest:
    """The pod of Ray's head, which runs the driver.

    Ray ends a stopped job's driver by SIGTERM, and by SIGKILL after RAY_JOB_STOP_WAIT_TIME_S.
    """
    container = _container("ray-head", values, kubernetes, values.head)
    container["env"].append(
        {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(values.saving_seconds)}
    )
    container["ports"] = [
        {"name": "gcs", "containerPort": 6379},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": METRICS_PORT},
    ]
    container |= _probes("/api/gcs_healthz", DASHBOARD_PORT)
    return _template(values, kubernetes, marks, container, values.head, HEAD_ACCOUNT)


def worker_template(
    values: Values, kubernetes: KubernetesValues, marks: dict[str, str], group: Group
) -> Manifest:
    """The pod of a worker group's machine."""
    machine = Machine(cpus=group.cpus, memory_gib=group.memory_gib)
    container = _container("ray-worker", values, kubernetes, machine, group.gpus)
    container["ports"] = [{"name": "metrics", "containerPort": METRICS_PORT}]
    container |= _probes("/api/local_raylet_healthz", AGENT_PORT)
    template = _template(values, kubernetes, marks, container, machine, WORKER_ACCOUNT)
    spec = template["spec"]
    spec["automountServiceAccountToken"] = False
    if group.gpus:
        spec["nodeSelector"] = dict(kubernetes.gpu_node_selector)
        spec["tolerations"] = tolerations(kubernetes.gpu_tolerations)
    return template


def submitter_template(
    values: Values, kubernetes: KubernetesValues, marks: dict[str, str]
) -> Manifest:
    """The pod that submits the job and prints its log; the driver runs in the head."""
    resources = {"cpu": "1", "memory": "2Gi"}
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": WORKER_ACCOUNT,
        "automountServiceAccountToken": False,
        "securityContext": security(),
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": values.image,
                "securityContext": container_security(),
                "resources": {"requests": resources, "limits": resources},
            }
        ],
    }
    if kubernetes.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": kubernetes.image_pull_secret}]
    return {"metadata": {"labels": dict(marks)}, "spec": spec}


def tolerations(taints: list[Toleration]) -> list[Manifest]:
    """As pods have them."""
    return [
        {
            "key": taint.key,
            "effect": taint.effect,
            **(
                {"operator": "Exists"}
                if taint.value is None
                else {"operator": "Equal", "value": taint.value}
            ),
        }
        for taint in taints
    ]


def _container(
    name: str, values: Values, kubernetes: KubernetesValues, machine: Machine, gpus: int = 0
) -> Manifest:
    """A Ray container; what it asks for is also its limit, so that it's the last to be evicted.

    A pod that is deleted is drained first: its workers save and leave within saving_seconds.
    """
    resources = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(values.saving_seconds)}
    environment = {**values.environment, **drain}
    container: Manifest = {
        "name": name,
        "image": values.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
        ],
    }
    if kubernetes.secret:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.secret}}]
    if kubernetes.shared_folder:
        mount = {"name": "shared", "mountPath": kubernetes.shared_folder.path}
        container["volumeMounts"].append(mount)
    return container


def _probes(path: str, port: int) -> Manifest:
    """Ray's own health checks. They take no token, and the network policy keeps others away."""
    check = {"httpGet": {"path": path, "port": port}, "periodSeconds": 5, "timeoutSeconds": 5}
    return {
        "startupProbe": {**check, "failureThreshold": 60},
        "readinessProbe": {**check, "failureThreshold": 10},
        "livenessProbe": {**check, "failureThreshold": 120},
    }


def _template(
    values: Values,
    kubernetes: KubernetesValues,
    marks: dict[str, str],
    container: Manifest,
    machine: Machine,
    account: str,
) -> Manifest:
    shm = {"medium": "Memory", "sizeLimit": f"{max(1, int(machine.memory_gib * _SHM_SHARE))}Gi"}
    spec: Manifest = {
        "serviceAccountName": account,
        "priorityClassName": PRIORITY_CLASS,
        "securityContext": security(),
        "terminationGracePeriodSeconds": values.saving_seconds + _KILL_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": shm},
            {"name": "recipe", "configMap": {"name": config_map(marks)}},
        ],
    }
    if kubernetes.cpu_node_selector:
        spec["nodeSelector"] = dict(kubernetes.cpu_node_selector)
    if kubernetes.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": kubernetes.image_pull_secret}]
    if kubernetes.shared_folder:
        claim = {"claimName": kubernetes.shared_folder.claim}
        spec["volumes"].append({"name": "shared", "persistentVolumeClaim": claim})
    return {"metadata": {"labels": dict(marks), "annotations": dict(_STAY)}, "spec": spec}
