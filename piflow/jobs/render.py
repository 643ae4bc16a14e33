"""The files of a target, from a recipe and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from piflow.config import Recipe
from piflow.jobs import autoscaler, kuberay, kueue, kustomize, pods, shared, sky, slurm
from piflow.jobs.demand import STAGES, Demand, demand, require_reachable
from piflow.jobs.pods import Manifest
from piflow.jobs.strict import Strict
from piflow.jobs.values import KubernetesValues, Values, ValuesError

Section = TypeVar("Section", bound=Strict)

_HEADER = "# Written by `piflow render`: change the recipe or the values, and render again.\n"
_RECIPE = "recipe.yaml"

Files = dict[str, str]
"""Contents by path, relative to the output folder."""


@dataclass(frozen=True)
class Job:
    """What is to be rendered.

    Attributes:
        recipe_text: the recipe's file, which the cluster reads with the same `overrides`.
    """

    recipe: Recipe
    recipe_text: str
    values: Values
    overrides: Sequence[str] = ()


def render(job: Job, target: str) -> Files:
    """The files of a target, a key of `TARGETS`.

    Raises:
        ValueError: values or recipe can't be used there; the message says what would help.
    """
    return TARGETS[target](job)


def _kuberay(job: Job) -> Files:
    """KubeRay's objects as kustomize folders."""
    recipe, values, overrides = job.recipe, job.values, job.overrides
    kubernetes = _given(values.kubernetes, "kubernetes")
    folder = kubernetes.shared_folder
    require_reachable(recipe, None if folder is None else folder.path)
    demands = [demand(recipe, values, stage) for stage in STAGES]
    files = {f"base/{_RECIPE}": job.recipe_text, **_base(recipe, values, kubernetes)}
    for needed in demands:
        ray_job = kuberay.ray_job(recipe, values, kubernetes, needed.stage, overrides)
        name = f"rayjob-{needed.stage}.yaml"
        files |= _folder(needed.stage, name, ray_job, kubernetes, needed)
    cluster = kuberay.dev_cluster(recipe, values, kubernetes)
    training = demands[STAGES.index("distill")]
    files |= _folder(kuberay.DEV, "raycluster-dev.yaml", cluster, kubernetes, training)
    parts = kustomize.components(values, kubernetes, demands, recipe.runtime.is_elastic)
    for name, component in parts.items():
        overlay = kustomize.kustomization(
            ["../../distill"], components=[f"../../components/{name}"]
        )
        files[f"components/{name}/kustomization.yaml"] = text_of([component])
        files[f"overlays/{name}/kustomization.yaml"] = text_of([overlay])
    if kubernetes.kueue is not None:
        files["queues/queues.yaml"] = text_of(kueue.queues(values, kubernetes))
        files["queues/kustomization.yaml"] = text_of([kustomize.kustomization(["queues.yaml"])])
    return files


def _aws(job: Job) -> Files:
    section = _given(job.values.aws, "aws")
    require_reachable(job.recipe, None)
    return _up(job, autoscaler.aws(job.recipe, job.values, section, _training(job)))


def _gcp(job: Job) -> Files:
    section = _given(job.values.gcp, "gcp")
    require_reachable(job.recipe, None)
    return _up(job, autoscaler.gcp(job.recipe, job.values, section, _training(job)))


def _on_premise(job: Job) -> Files:
    section = _given(job.values.on_premise, "on_premise")
    require_reachable(job.recipe, None)
    return _up(job, autoscaler.on_premise(job.recipe, job.values, section, _training(job)))


def _slurm(job: Job) -> Files:
    section = _given(job.values.slurm, "slurm")
    script = slurm.script(job.recipe, job.values, section, _training(job), job.overrides)
    return {_RECIPE: job.recipe_text, "piflow.sbatch": script}


def _sky(job: Job) -> Files:
    section = _given(job.values.sky, "sky")
    task = sky.task(job.recipe, job.values, section, _training(job), job.overrides)
    return {_RECIPE: job.recipe_text, "task.yaml": text_of([task])}


TARGETS: Mapping[str, Callable[[Job], Files]] = {
    "kuberay": _kuberay,
    "aws": _aws,
    "gcp": _gcp,
    "on-premise": _on_premise,
    "slurm": _slurm,
    "sky": _sky,
}


def _up(job: Job, config: Mapping[str, Any]) -> Files:
    comes = config["provider"]["type"] != "local"
    submit = autoscaler.submit_script(job.overrides, machines_come=comes)
    config_text = text_of([config])
    return {_RECIPE: job.recipe_text, "cluster.yaml": config_text, "submit.sh": submit}


def _training(job: Job) -> Demand:
    return demand(job.recipe, job.values, "distill")


def _given(section: Section | None, name: str) -> Section:
    if section is None:
        raise ValuesError(f"this target needs the values' section {name}, which is missing")
    return section


def text_of(documents: Iterable[Mapping[str, object]]) -> str:
    """YAML documents with a line on where they come from."""
    texts = [
        yaml.dump(document, Dumper=_Plain, sort_keys=False, width=100, allow_unicode=True)
        for document in documents
    ]
    return _HEADER + "---\n".join(texts)


def write(files: Files, folder: Path) -> None:
    """Write the files below `folder`.

    Raises:
        FileExistsError: the folder holds something that no rendering wrote, which would be lost.
    """
    for name in files:
        path = folder / name
        foreign = path.is_file() and _HEADER not in path.read_text()
        if foreign and Path(name).name != _RECIPE:
            raise FileExistsError(
                f"{path} is there and wasn't written by `piflow render`; give another folder with "
                "--out, or move it away"
            )
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _base(recipe: Recipe, values: Values, kubernetes: KubernetesValues) -> Files:
    run = kuberay.run_name(recipe, values)
    generator = {
        "name": pods.config_map(pods.labels(run, run, "shared")),
        "namespace": kubernetes.namespace,
        "files": [_RECIPE],
        "options": {"disableNameSuffixHash": True},  # kustomize doesn't know who names it
    }
    objects = {
        "accounts.yaml": shared.service_accounts(kubernetes),
        "network.yaml": [shared.network_policy(kubernetes, run)],
        "priority.yaml": [shared.priority_class(kubernetes)],
    }
    parts = kustomize.kustomization(list(objects), configMapGenerator=[generator])
    files = {f"base/{name}": text_of(documents) for name, documents in objects.items()}
    return {**files, "base/kustomization.yaml": text_of([parts])}


def _folder(
    folder: str, name: str, document: Manifest, kubernetes: KubernetesValues, needed: Demand
) -> Files:
    """A stage's folder: its job or cluster and the disruption budgets of its pods."""
    metadata = document["metadata"]
    budgets = shared.disruption_budgets(kubernetes, metadata["name"], metadata["labels"], needed)
    parts = kustomize.kustomization(["../base", name, "disruption.yaml"])
    return {
        f"{folder}/{name}": text_of([document]),
        f"{folder}/disruption.yaml": text_of(budgets),
        f"{folder}/kustomization.yaml": text_of([parts]),
    }


class _Plain(yaml.SafeDumper):
    """Every value is written where it stands, and long texts as blocks."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _text)
