"""The committed Kubernetes files by kustomize and by the schemas of Kubernetes' own kinds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.cluster_files import custom_kinds

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"
KUBECTL = Path(sys.executable).with_name("kubectl")
VERSION = "1.34"  # of Kubernetes; the oldest that is kept up
FOLDERS = sorted(
    str(path.parent.relative_to(KUBERAY))
    for path in KUBERAY.rglob("kustomization.yaml")
    if "components" not in path.parts
)


def build(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    if done.returncode:
        raise ValueError(done.stderr)
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def check(documents: list[dict[str, Any]]) -> None:
    """Every object is what its kind says, unknown fields refused."""
    for document in documents:
        if document["kind"] in custom_kinds.KINDS:
            assert custom_kinds.problems(document) == []
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)


def ray_job(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = (document for document in documents if document["kind"] == "RayJob")
    return job


def gpu_pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_builds_into_valid_objects(folder: str) -> None:
    documents = build(KUBERAY / folder)
    check(documents)
    if folder != "queues":
        kinds = {document["kind"] for document in documents}
        shared = {"ConfigMap", "NetworkPolicy", "PriorityClass", "ServiceAccount"}
        assert kinds >= shared


def test_the_recipe_lies_in_the_config_map_that_pods_mount() -> None:
    documents = build(KUBERAY / "distill")
    (config,) = (document for document in documents if document["kind"] == "ConfigMap")
    assert config["data"]["recipe.yaml"] == (KUBERAY / "base" / "recipe.yaml").read_text()
    assert config["metadata"]["namespace"] == "piflow"
    volumes = gpu_pod(ray_job(documents))["spec"]["volumes"]
    assert {"name": "recipe", "configMap": {"name": config["metadata"]["name"]}} in volumes


def test_efa_devices_come_with_their_memory() -> None:
    (container,) = gpu_pod(ray_job(build(KUBERAY / "overlays/aws-efa")))["spec"]["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["vpc.amazonaws.com/efa"] == "32"
        assert container["resources"][kind]["hugepages-2Mi"] == "5Gi"
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}


def test_spot_pods_end_within_the_notice_on_spot_machines() -> None:
    spec = gpu_pod(ray_job(build(KUBERAY / "overlays/spot")))["spec"]
    assert spec["terminationGracePeriodSeconds"] == 120
    assert spec["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
    assert spec["nodeSelector"]["node.kubernetes.io/instance-type"] == "p5.48xlarge"


def test_kueue_admits_a_whole_job_that_nothing_scales() -> None:
    job = ray_job(build(KUBERAY / "overlays/kueue"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in cluster
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert "kueue.x-k8s.io/podset-required-topology" in gpu_pod(job)["metadata"]["annotations"]


def test_an_elastic_job_keeps_its_autoscaler_and_asks_for_no_topology() -> None:
    job = ray_job(build(KUBERAY / "overlays/elastic"))
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert not [k for k in gpu_pod(job)["metadata"]["annotations"] if "kueue" in k]


def test_a_queue_has_a_quota_for_everything_that_its_jobs_ask_for(tmp_path: Path) -> None:
    job = ray_job(together(tmp_path, "aws-efa", "kueue"))
    asked = set(gpu_pod(job)["spec"]["containers"][0]["resources"]["requests"])
    queues = build(KUBERAY / "queues")
    (queue,) = (document for document in queues if document["kind"] == "ClusterQueue")
    assert asked <= set(queue["spec"]["resourceGroups"][0]["coveredResources"])


def together(folder: Path, *components: str) -> list[dict[str, Any]]:
    """The distillation with several components, as a team combines them."""
    shutil.copytree(KUBERAY, folder / "kuberay")
    own = folder / "kuberay" / "overlays" / "own"
    own.mkdir()
    parts = [f"../../components/{name}" for name in components]
    tree = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../distill"],
        "components": parts,
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    return build(own)


@pytest.mark.parametrize("network", ["aws-efa", "gke-rdma"])
def test_components_can_be_combined(tmp_path: Path, network: str) -> None:
    documents = together(tmp_path, network, "spot", "kueue")
    check(documents)
    template = gpu_pod(ray_job(documents))
    assert template["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
    annotations = template["metadata"]["annotations"]
    assert "kueue.x-k8s.io/podset-required-topology" in annotations
    assert ("networking.gke.io/interfaces" in annotations) == (network == "gke-rdma")


def test_a_planted_field_is_refused_in_a_core_kind() -> None:
    documents = build(KUBERAY / "base")
    (policy,) = (document for document in documents if document["kind"] == "NetworkPolicy")
    policy["spec"]["podselector"] = policy["spec"].pop("podSelector")
    with pytest.raises(kubernetes_validate.ValidationError, match="podselector"):
        check(documents)


def test_a_planted_path_in_a_component_is_found(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    component = tmp_path / "kuberay" / "components" / "spot" / "kustomization.yaml"
    text = component.read_text()
    component.write_text(text.replace("/terminationGracePeriodSeconds", "/terminationGrace"))
    with pytest.raises(AssertionError, match="terminationGrace"):
        check(build(tmp_path / "kuberay" / "overlays" / "spot"))


def test_a_planted_index_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    component = tmp_path / "kuberay" / "components" / "spot" / "kustomization.yaml"
    component.write_text(component.read_text().replace("Specs/0/", "Specs/7/"))
    with pytest.raises(ValueError, match="workerGroupSpecs/7"):
        build(tmp_path / "kuberay" / "overlays" / "spot")
