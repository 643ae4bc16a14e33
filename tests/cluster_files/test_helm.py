"""infra/helm/: values, the page that installs them, and what piflow's own files count on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from piflow.jobs.values import KubernetesValues, load_values

REPOSITORY = Path(__file__).parents[2]
HELM = REPOSITORY / "infra" / "helm"
CHARTS = sorted(path.stem for path in HELM.glob("*.yaml"))
PAGE = (REPOSITORY / "docs" / "kubernetes.md").read_text()


def values(chart: str) -> dict[str, Any]:
    tree = yaml.safe_load((HELM / f"{chart}.yaml").read_text())
    assert isinstance(tree, dict)
    return tree


def install(chart: str) -> dict[str, str]:
    """The page's command for a chart: its version, namespace and file."""
    (line,) = re.findall(rf"^helm upgrade --install {chart} .*$", PAGE, re.M)
    return {
        name: re.findall(rf"{option} (\S+)", line)[0]
        for name, option in (("version", "--version"), ("namespace", "-n"), ("file", "-f"))
    }


@pytest.mark.parametrize("chart", CHARTS)
def test_the_page_installs_the_version_that_the_file_is_for(chart: str) -> None:
    told = install(chart)
    head = (HELM / f"{chart}.yaml").read_text().splitlines()[0]
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", told["version"])
    assert head.startswith(f"# Chart {chart} {told['version']} of ")
    assert (REPOSITORY / told["file"]) == HELM / f"{chart}.yaml"


def test_namespaces_are_those_that_the_network_policy_lets_in() -> None:
    fields = KubernetesValues.model_fields
    operator, monitoring = (
        fields[name].default for name in ("operator_namespace", "monitoring_namespace")
    )
    assert install("kuberay-operator")["namespace"] == operator
    assert install("kube-prometheus-stack")["namespace"] == monitoring
    assert values("kueue")["metrics"]["prometheusNamespace"] == monitoring


def test_kueue_knows_what_is_rendered_for_it() -> None:
    tree = values("kueue")
    manager = yaml.safe_load(tree["managerConfig"]["controllerManagerConfigYaml"])
    assert {"ray.io/rayjob", "ray.io/raycluster"} <= set(manager["integrations"]["frameworks"])
    gates = {gate["name"]: gate["enabled"] for gate in tree["controllerManager"]["featureGates"]}
    assert gates == {"ElasticJobsViaWorkloadSlices": True}  # docs/kubernetes.md, `elastic`
    start = load_values(REPOSITORY / "cluster" / "values.yaml").limits.start_minutes
    assert manager["waitForPodsReady"]["timeout"] == f"{start:.0f}m"


def test_gpu_pods_may_run_where_the_operator_looks() -> None:
    taints = {
        toleration["key"] for toleration in values("gpu-operator")["daemonsets"]["tolerations"]
    }
    own = KubernetesValues.model_fields["gpu_tolerations"].default
    assert {toleration.key for toleration in own} <= taints


def secrets(tree: Any, path: str = "") -> list[str]:
    """Values that look like a secret's content; a Secret's name and its keys' names are none."""
    if isinstance(tree, dict):
        return [found for key, value in tree.items() for found in secrets(value, f"{path}.{key}")]
    names_one = re.search(r"(?i)(existing\w*secret\.(name|\w+Key)|existingSecret)$", path)
    return [path] if re.search(r"(?i)password|token|secret", path) and not names_one else []


@pytest.mark.parametrize("chart", CHARTS)
def test_nothing_secret_stands_in_values(chart: str) -> None:
    assert secrets(values(chart)) == []


def test_a_planted_password_is_found() -> None:
    tree = values("mlflow")
    tree["auth"]["adminPassword"] = "planted"
    assert secrets(tree) == [".auth.adminPassword"]
