"""Kueue's queues: quotas of a team, kinds of machines, and what comes first."""

from __future__ import annotations

from piflow.jobs.pods import Manifest
from piflow.jobs.values import KubernetesValues, Values

_API = "kueue.x-k8s.io/v1beta2"
_PRIORITIES = {"piflow-interactive": 10_000, "piflow-training": 1_000}


def queues(values: Values, kubernetes: KubernetesValues) -> list[Manifest]:
    """What a cluster's administrator creates once."""
    kueue = kubernetes.kueue
    assert kueue is not None
    return [
        _object("Topology", "piflow-gpu", {"levels": _levels(kueue.topology_level)}),
        *_flavors(kubernetes),
        _cluster_queue(values, kubernetes),
        _object(
            "LocalQueue",
            kueue.queue,
            {"clusterQueue": kueue.cluster_queue},
            namespace=kubernetes.namespace,
        ),
        *(
            {
                "apiVersion": _API,
                "kind": "WorkloadPriorityClass",
                "metadata": {"name": name},
                "value": value,
                "description": "Of piflow's jobs in Kueue's queues",
            }
            for name, value in {kueue.priority: 1_000, **_PRIORITIES}.items()
        ),
    ]


def _levels(level: str) -> list[Manifest]:
    return [{"nodeLabel": label} for label in (level, "kubernetes.io/hostname")]


def _flavors(kubernetes: KubernetesValues) -> list[Manifest]:
    flavors: dict[str, Manifest] = {
        "piflow-gpu": {
            "nodeLabels": dict(kubernetes.gpu_node_selector),
            "topologyName": "piflow-gpu",
        },
        "piflow-cpu": (
            {"nodeLabels": dict(kubernetes.cpu_node_selector)}
            if kubernetes.cpu_node_selector
            else {}
        ),
    }
    return [_object("ResourceFlavor", name, spec) for name, spec in flavors.items()]


def _cluster_queue(values: Values, kubernetes: KubernetesValues) -> Manifest:
    """A pod is admitted only if everything that it asks for has a quota, EFA and huge pages too."""
    kueue = kubernetes.kueue
    assert kueue is not None
    quota: dict[str, int | str] = {
        "cpu": kueue.cpus,
        "memory": f"{kueue.memory_gib}Gi",
        "nvidia.com/gpu": kueue.gpus,
    }
    if kubernetes.efa is not None and values.gpu_machines is not None:
        machines = -(-kueue.gpus // values.gpu_machines.gpus)
        quota["vpc.amazonaws.com/efa"] = machines * kubernetes.efa.interfaces
        quota["hugepages-2Mi"] = f"{machines * kubernetes.efa.hugepages_gib}Gi"
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
    without = [
        {"name": name, "nominalQuota": amount if name in ("cpu", "memory") else 0}
        for name, amount in quota.items()
    ]
    spec = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": kubernetes.namespace},
        },
        "queueingStrategy": "BestEffortFIFO",
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [
            {
                "coveredResources": list(quota),
                "flavors": [
                    {"name": "piflow-cpu", "resources": without},
                    {"name": "piflow-gpu", "resources": resources},
                ],
            }
        ],
    }
    return _object("ClusterQueue", kueue.cluster_queue, spec)


def _object(kind: str, name: str, spec: Manifest, namespace: str | None = None) -> Manifest:
    metadata = {"name": name} if namespace is None else {"name": name, "namespace": namespace}
    return {"apiVersion": _API, "kind": kind, "metadata": metadata, "spec": spec}
