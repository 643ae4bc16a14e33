"""Kustomize: what a cluster's network, spot machines and queues change of the stages' objects.

A component changes one thing and can be combined with others; an overlay is the distillation with
one component.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

from piflow.jobs.demand import Demand, Group
from piflow.jobs.kuberay import DEV
from piflow.jobs.pods import Manifest, tolerations
from piflow.jobs.values import KubernetesValues, Values

_API, _COMPONENT_API = "kustomize.config.k8s.io/v1beta1", "kustomize.config.k8s.io/v1alpha1"
_ROOTS = {"RayJob": "/spec/rayClusterSpec", "RayCluster": "/spec"}

Operations = list[Manifest]


def kustomization(resources: Sequence[str], **keys: Any) -> Manifest:
    """The file that names a folder's parts."""
    return {"apiVersion": _API, "kind": "Kustomization", "resources": list(resources), **keys}


def components(
    values: Values, kubernetes: KubernetesValues, demands: Sequence[Demand], elastic: bool
) -> dict[str, Manifest]:
    """Components by name, as far as the values speak of them.

    Args:
        demands: of all stages.
        elastic: whether the recipe's number of workers is a range.
    """
    with_gpus = [needed for needed in demands if needed.has_gpus]
    found: dict[str, Manifest] = {}
    if with_gpus and values.gpu_machines is not None:
        share = values.gpu_machines.gpus
        if kubernetes.efa is not None:
            found["aws-efa"] = _of_gpu_groups(with_gpus, lambda g: _efa(kubernetes, g, share))
        if kubernetes.gke_rdma is not None:
            found["gke-rdma"] = _of_gpu_groups(with_gpus, lambda _: _gke_rdma(kubernetes))
        if kubernetes.spot is not None:
            found["spot"] = _of_gpu_groups(with_gpus, lambda _: _spot(kubernetes))
    if kubernetes.kueue is not None:
        queued = {needed.stage: _queued(kubernetes, needed) for needed in demands}
        found["kueue"] = _component([_patch("RayJob", [s], ops) for s, ops in queued.items()])
        if elastic:
            found["elastic"] = _component([_patch("RayJob", ["distill"], _elastic(kubernetes))])
    return found


def _component(patches: Iterable[Manifest]) -> Manifest:
    return {"apiVersion": _COMPONENT_API, "kind": "Component", "patches": list(patches)}


def _of_gpu_groups(
    demands: Sequence[Demand], operations: Callable[[Group], list[tuple[str, str, Any]]]
) -> Manifest:
    """The same change to the GPU group of every stage, jobs and the development cluster alike."""
    patches = []
    for needed in demands:
        changes = operations(needed.groups[0])
        kinds: list[tuple[str, str]] = [("RayJob", needed.stage)]
        kinds += [("RayCluster", DEV)] if needed.stage == "distill" else []
        for kind, stage in kinds:
            root = f"{_ROOTS[kind]}/workerGroupSpecs/0/template"
            patch = [{"op": op, "path": f"{root}{path}", "value": v} for op, path, v in changes]
            patches.append(_patch(kind, [stage], patch))
    return _component(patches)


def _patch(kind: str, stages: Sequence[str], operations: Operations) -> Manifest:
    selector = f"app.kubernetes.io/component in ({', '.join(stages)})"
    return {
        "target": {"kind": kind, "labelSelector": selector},
        "patch": yaml.safe_dump(operations, sort_keys=False),
    }


def _efa(
    kubernetes: KubernetesValues, group: Group, machine_gpus: int
) -> list[tuple[str, str, Any]]:
    """The provider is left to libfabric, and protocol and buffers to NCCL: they choose well."""
    assert kubernetes.efa is not None
    container = "/spec/containers/0"
    interfaces = str(max(1, kubernetes.efa.interfaces * group.gpus // machine_gpus))
    pages = f"{kubernetes.efa.hugepages_gib}Gi"
    changes: list[tuple[str, str, Any]] = []
    for kind in ("requests", "limits"):
        changes += [
            ("add", f"{container}/resources/{kind}/vpc.amazonaws.com~1efa", interfaces),
            ("add", f"{container}/resources/{kind}/hugepages-2Mi", pages),
        ]
    changes += [
        ("add", f"{container}/securityContext/capabilities/add", ["IPC_LOCK"]),
        ("add", f"{container}/env/-", {"name": "FI_EFA_USE_HUGE_PAGE", "value": "0"}),
        ("add", f"{container}/env/-", {"name": "NCCL_SOCKET_IFNAME", "value": "^lo,docker,veth"}),
    ]
    return changes


def _gke_rdma(kubernetes: KubernetesValues) -> list[tuple[str, str, Any]]:
    """Google's NCCL plug-in from the machine; bash reads its settings before it starts Ray."""
    assert kubernetes.gke_rdma is not None
    names = ["default", "gvnic-1", *(f"rdma-{i}" for i in range(kubernetes.gke_rdma.interfaces))]
    networks = [{"interfaceName": f"eth{i}", "network": name} for i, name in enumerate(names)]
    annotations = {  # each by itself: other components have some too
        "networking.gke.io/default-interface": "eth0",
        "networking.gke.io/interfaces": json.dumps(networks),
    }
    container = "/spec/containers/0"
    changes: list[tuple[str, str, Any]] = [
        ("add", f"/metadata/annotations/{_escaped(key)}", text) for key, text in annotations.items()
    ]
    for name, path, target in (
        ("nvidia", "/home/kubernetes/bin/nvidia", "/usr/local/nvidia"),
        ("gib", "/home/kubernetes/bin/gib", "/usr/local/gib"),
    ):
        mount = {"name": name, "mountPath": target, "readOnly": True}
        changes += [
            ("add", "/spec/volumes/-", {"name": name, "hostPath": {"path": path}}),
            ("add", f"{container}/volumeMounts/-", mount),
        ]
    settings = {
        "BASH_ENV": "/usr/local/gib/scripts/set_nccl_env.sh",
        "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
    }
    changes += [("add", f"{container}/env/-", {"name": n, "value": v}) for n, v in settings.items()]
    return changes


def _spot(kubernetes: KubernetesValues) -> list[tuple[str, str, Any]]:
    """GPU machines that may be taken away; what remains after the notice is for saving."""
    assert kubernetes.spot is not None
    changes: list[tuple[str, str, Any]] = [
        ("add", f"/spec/nodeSelector/{_escaped(key)}", value)
        for key, value in kubernetes.spot.node_selector.items()
    ]
    changes += [("add", "/spec/tolerations/-", t) for t in tolerations(kubernetes.spot.tolerations)]
    seconds = kubernetes.spot.notice_seconds
    return [*changes, ("replace", "/spec/terminationGracePeriodSeconds", seconds)]


def _labelled(kubernetes: KubernetesValues) -> Operations:
    assert kubernetes.kueue is not None
    marks = {
        "kueue.x-k8s.io/queue-name": kubernetes.kueue.queue,
        "kueue.x-k8s.io/priority-class": kubernetes.kueue.priority,
    }
    return [
        {"op": "add", "path": f"/metadata/labels/{_escaped(key)}", "value": value}
        for key, value in marks.items()
    ]


def _queued(kubernetes: KubernetesValues, needed: Demand) -> Operations:
    """All machines at once, near one another: Kueue admits a whole job, and nothing scales it."""
    assert kubernetes.kueue is not None
    root = _ROOTS["RayJob"]
    operations = _labelled(kubernetes)
    operations += [
        {"op": "replace", "path": f"{root}/enableInTreeAutoscaling", "value": False},
        {"op": "remove", "path": f"{root}/autoscalerOptions"},
    ]
    for index, group in enumerate(needed.groups):
        path = f"{root}/workerGroupSpecs/{index}"
        operations += [
            {"op": "replace", "path": f"{path}/{key}", "value": group.most}
            for key in ("replicas", "minReplicas")
        ]
        operations.append({"op": "remove", "path": f"{path}/idleTimeoutSeconds"})
    if needed.has_gpus:
        key = _escaped("kueue.x-k8s.io/podset-required-topology")
        path = f"{root}/workerGroupSpecs/0/template/metadata/annotations/{key}"
        level = kubernetes.kueue.topology_level
        operations.append({"op": "add", "path": path, "value": level})
    return operations


def _elastic(kubernetes: KubernetesValues) -> Operations:
    """The autoscaler stays, and Kueue admits what it asks for piece by piece.

    Needs Kueue's feature gate ElasticJobsViaWorkloadSlices; topology can't be asked for with it.
    """
    elastic = {"kueue.x-k8s.io/elastic-job": "true"}
    annotate = {"op": "add", "path": "/metadata/annotations", "value": elastic}
    return [*_labelled(kubernetes), annotate]


def _escaped(key: str) -> str:
    """A key in a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")
