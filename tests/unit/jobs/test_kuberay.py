"""What `piflow render --target kuberay` writes: the committed example, and rules it must keep."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from piflow import cli
from piflow.config import load_recipe
from piflow.jobs.render import Job, render, write
from piflow.jobs.values import Values, load_values
from tests.cluster_files import custom_kinds

REPOSITORY = Path(__file__).parents[3]
CLUSTER = REPOSITORY / "cluster"
RECIPE, VALUES = CLUSTER / "recipe.yaml", CLUSTER / "values.yaml"
STAGES = ("embed", "distill", "evaluate")


@functools.cache
def rendered(*overrides: str) -> dict[str, str]:
    return rendered_with(load_values(VALUES), *overrides)


def rendered_with(values: Values, *overrides: str) -> dict[str, str]:
    recipe = load_recipe(RECIPE, list(overrides))
    return render(Job(recipe, RECIPE.read_text(), values, overrides), "kuberay")


def parsed(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def documents(files: dict[str, str]) -> Iterator[dict[str, Any]]:
    for name, text in files.items():
        if not name.endswith("recipe.yaml"):
            yield from parsed(text)


def job(stage: str, *overrides: str) -> dict[str, Any]:
    return parsed(rendered(*overrides)[f"{stage}/rayjob-{stage}.yaml"])[0]


def dev() -> dict[str, Any]:
    return parsed(rendered()["dev/raycluster-dev.yaml"])[0]


def clusters() -> dict[str, dict[str, Any]]:
    """The cluster of every stage and the one to develop on."""
    return {s: job(s)["spec"]["rayClusterSpec"] for s in STAGES} | {"dev": dev()["spec"]}


def templates() -> dict[str, dict[str, Any]]:
    found = {}
    for name, cluster in clusters().items():
        found[f"{name} head"] = cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            found[f"{name} {group['groupName']}"] = group["template"]
    return found


CLUSTERS, TEMPLATES = clusters(), templates()


def test_the_committed_example_is_what_is_written(tmp_path: Path) -> None:
    arguments = ["render", str(RECIPE), "--target", "kuberay", "--values", str(VALUES)]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    folder = CLUSTER / "kuberay"
    example = {p.relative_to(folder): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert written == example, "render cluster/ again: CONTRIBUTING.md says how"


def test_custom_objects_are_what_their_definitions_say() -> None:
    checked = []
    for document in documents(rendered()):
        if document["kind"] in custom_kinds.KINDS:
            assert custom_kinds.problems(document) == []
            checked.append(document["kind"])
    assert set(checked) == custom_kinds.KINDS


def _typo(job: dict[str, Any]) -> None:
    job["spec"]["backofflimit"] = job["spec"].pop("backoffLimit")


def _typo_in_a_pod(job: dict[str, Any]) -> None:
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    template["spec"]["containers"][0]["securityContext"]["runAsNonroot"] = True


def _wrong_type(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _wrong_choice(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"


@pytest.mark.parametrize("plant", [_typo, _typo_in_a_pod, _wrong_type, _wrong_choice])
def test_a_planted_mistake_is_found_by_the_definitions(
    plant: Callable[[dict[str, Any]], None],
) -> None:
    document = copy.deepcopy(job("distill"))
    plant(document)
    assert len(custom_kinds.problems(document)) == 1


@pytest.mark.parametrize("workers", ["8", "[8, 16]", "[2, 24]", "4"])
def test_gpus_of_the_cluster_are_the_recipes_workers(workers: str) -> None:
    group = job("distill", f"runtime.num_workers={workers}")["spec"]["rayClusterSpec"][
        "workerGroupSpecs"
    ][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    most = load_recipe(RECIPE, [f"runtime.num_workers={workers}"]).runtime.max_workers
    assert group["maxReplicas"] * int(limits["nvidia.com/gpu"]) == most
    assert group["rayStartParams"]["num-gpus"] == limits["nvidia.com/gpu"]
    assert group["rayStartParams"]["num-cpus"] == limits["cpu"]


@pytest.mark.parametrize("name", list(CLUSTERS))
def test_a_cluster_begins_with_nothing_but_a_head_that_computes_nothing(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        assert group["idleTimeoutSeconds"] == 300


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_pods_are_restricted_probed_and_have_time_to_save(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "lifecycle" not in container and "restartPolicy" not in spec  # autoscaler v2 sets it
    shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    environment = {item["name"]: item["value"] for item in container["env"]}
    drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert drain == 90 < spec["terminationGracePeriodSeconds"]
    stop = environment.get("RAY_JOB_STOP_WAIT_TIME_S")
    assert (stop == "90") if name.endswith("head") else (stop is None)


@pytest.mark.parametrize("stage", STAGES)
def test_jobs_end_and_are_tried_again(stage: str) -> None:
    spec = job(stage)["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] == 600
    assert "deletionStrategy" not in spec  # never both
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (259200, 3600)
    assert spec["backoffLimit"] == 2
    assert "entrypointNumGpus" not in spec, "GPUs are the workers'"
    assert len(job(stage)["metadata"]["name"]) <= 47


def test_an_evaluation_without_workers_has_a_gpu_for_its_driver() -> None:
    assert job("evaluate", "evaluation.workers=0")["spec"]["entrypointNumGpus"] == 1


def test_gcs_fault_tolerance_is_the_development_clusters_with_its_password_in_a_secret() -> None:
    options = dev()["spec"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "piflow-redis"
    assert "value" not in options["redisPassword"]


def test_overrides_reach_the_jobs_quoted() -> None:
    entrypoint = job("distill", "training.steps=5", "seed=3")["spec"]["entrypoint"]
    assert entrypoint.endswith("--set training.steps=5 --set seed=3")
    name = "embed.prompts=s3://b/$(id) 'x'.txt"
    assert job("embed", name)["spec"]["entrypoint"].endswith(f"--set {_quoted(name)}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def test_a_shared_folder_is_mounted_and_worked_in() -> None:
    tree = load_values(VALUES).model_dump()
    tree["kubernetes"]["shared_folder"] = {"claim": "piflow-data"}
    files = rendered_with(Values.model_validate(tree), "run_dir=runs/a")
    spec = parsed(files["distill/rayjob-distill.yaml"])[0]["spec"]
    assert spec["entrypoint"].startswith("cd /mnt/piflow && exec piflow distill ")
    pod = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert {"name": "shared", "mountPath": "/mnt/piflow"} in pod["containers"][0]["volumeMounts"]
    claim = {"name": "shared", "persistentVolumeClaim": {"claimName": "piflow-data"}}
    assert claim in pod["volumes"]


def test_budgets_and_policies_select_labels_that_pods_have() -> None:
    files = rendered()
    policy = parsed(files["base/network.yaml"])[0]["spec"]
    for name, template in TEMPLATES.items():
        marks = template["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= marks.items(), name
        stage = name.split()[0]
        for budget in parsed(files[f"{stage}/disruption.yaml"]):
            wanted = dict(budget["spec"]["selector"]["matchLabels"])
            wanted.pop("ray.io/node-type", None)  # which the operator sets
            wanted.pop("ray.io/group", None)
            assert wanted.items() <= marks.items(), name
    submitter = job("distill")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= submitter.items()
    open_ports = [port for rule in policy["egress"] for port in rule.get("ports", [])]
    assert {"protocol": "UDP", "port": 53} in open_ports


def test_a_budget_lets_an_elastic_run_lose_what_it_can_do_without() -> None:
    def workers(*overrides: str) -> int:
        text = rendered(*overrides)["distill/disruption.yaml"]
        (budget,) = (b for b in parsed(text) if b["metadata"]["name"].endswith("workers"))
        return budget["spec"]["minAvailable"]

    assert workers("runtime.num_workers=[8, 16]") == 1
    assert workers("runtime.num_workers=16") == 2


def test_nothing_that_is_known_to_do_harm() -> None:
    text = "\n".join(rendered().values())
    for banned in ("ray stop", "FI_PROVIDER", "NCCL_PROTO", "RDMAV_", ":latest", "NodePort"):
        assert banned not in text, banned
    images = re.findall(r"image: (\S+)", text)
    assert images and all(re.search(r"@sha256:[0-9a-f]{64}$", image) for image in images)


def test_what_values_and_recipe_do_not_speak_of_is_absent() -> None:
    tree = load_values(VALUES).model_dump()
    tree["kubernetes"] |= {"efa": None, "gke_rdma": None, "spot": None, "kueue": None}
    assert not [n for n in rendered_with(Values.model_validate(tree)) if "overlays" in n]
    assert "overlays/elastic/kustomization.yaml" in rendered()
    assert "overlays/elastic/kustomization.yaml" not in rendered("runtime.num_workers=16")


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "network.yaml").write_text("mine\n")
    with pytest.raises(FileExistsError, match="--out"):
        write(rendered(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*.yaml")] == ["network.yaml"]
    (tmp_path / "base" / "network.yaml").unlink()
    write(rendered(), tmp_path)
    write(rendered("training.steps=7"), tmp_path)  # its own are written again


def test_a_target_without_its_values_is_refused() -> None:
    tree = load_values(VALUES).model_dump() | {"kubernetes": None}
    with pytest.raises(ValueError, match="section kubernetes"):
        rendered_with(Values.model_validate(tree))
