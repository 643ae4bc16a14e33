"""What all stages of a run share on Kubernetes: accounts, priority, disruption budget, network."""

from __future__ import annotations

from piflow.jobs import pods
from piflow.jobs.demand import Demand
from piflow.jobs.pods import Manifest
from piflow.jobs.values import KubernetesValues

_NAMESPACE_NAME = "kubernetes.io/metadata.name"  # a label that every namespace has


def priority_class(kubernetes: KubernetesValues) -> Manifest:
    """Training comes before what has no class."""
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": pods.PRIORITY_CLASS},
        "value": kubernetes.priority,
        "globalDefault": False,
        "preemptionPolicy": "PreemptLowerPriority",
        "description": "Pods of piflow's jobs",
    }


def service_accounts(kubernetes: KubernetesValues) -> list[Manifest]:
    """Of heads, whose autoscaler the operator binds a role to, and of all other pods."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {
                "name": name,
                "namespace": kubernetes.namespace,
                **(
                    {"annotations": dict(kubernetes.service_account_annotations)}
                    if kubernetes.service_account_annotations
                    else {}
                ),
            },
            "automountServiceAccountToken": name == pods.HEAD_ACCOUNT,
        }
        for name in (pods.HEAD_ACCOUNT, pods.WORKER_ACCOUNT)
    ]


def disruption_budgets(
    kubernetes: KubernetesValues, job: str, marks: dict[str, str], needed: Demand
) -> list[Manifest]:
    """A head may not be evicted, and no more workers than leave the fewest that the stage needs.

    Pods are selected by labels, and numbers are whole: a RayCluster isn't a controller of which
    Kubernetes knows how many pods it wants.
    """
    workers = needed.groups[0]
    wanted = {"head": 1, "workers": max(workers.fewest, 1)}
    kinds = {"head": {"ray.io/node-type": "head"}, "workers": {"ray.io/group": workers.name}}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": f"{job}-{name}",
                "namespace": kubernetes.namespace,
                "labels": dict(marks),
            },
            "spec": {
                "minAvailable": number,
                "selector": {
                    "matchLabels": {"app.kubernetes.io/instance": job, **kinds[name]},
                },
            },
        }
        for name, number in wanted.items()
    ]


def network_policy(kubernetes: KubernetesValues, run: str) -> Manifest:
    """A run's pods talk to one another, to DNS, to HTTPS and to what the values name.

    From elsewhere only the operator reaches the dashboard, and Prometheus the metrics.
    """
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": run}}}
    dns = {"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: "kube-system"}}}
    open_ports = {
        kubernetes.operator_namespace: [pods.DASHBOARD_PORT],
        kubernetes.monitoring_namespace: [pods.METRICS_PORT],
    }
    egress: list[Manifest] = [
        {"to": [own]},
        {"to": [dns], "ports": _ports(53, "UDP") + _ports(53, "TCP")},
        {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": _ports(443) + _ports(6443)},
    ]
    if kubernetes.redis is not None:
        egress.append({"ports": _ports(int(kubernetes.redis.address.rpartition(":")[2]))})
    egress += [
        {"to": [{"ipBlock": {"cidr": rule.cidr}}], "ports": _ports(rule.port)}
        for rule in kubernetes.egress
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": run, "namespace": kubernetes.namespace},
        "spec": {
            "podSelector": dict(own["podSelector"]),
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                *(
                    {
                        "from": [{"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: name}}}],
                        "ports": [port for number in numbers for port in _ports(number)],
                    }
                    for name, numbers in open_ports.items()
                ),
            ],
            "egress": egress,
        },
    }


def _ports(number: int, protocol: str = "TCP") -> list[Manifest]:
    return [{"protocol": protocol, "port": number}]
