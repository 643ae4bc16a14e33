"""The files of a target, from a recipe and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from piflow.config import Recipe
from piflow.jobs import kuberay, kueue, kustomize, pods, shared
from piflow.jobs.demand import STAGES, Demand, demand, require_reachable
from piflow.jobs.pods import Manifest
from piflow.jobs.values import KubernetesValues, Values, ValuesError

_HEADER = "# Written by `piflow render`: change the recipe or the values, and render again.\n"
_RECIPE = "recipe.yaml"

Files = dict[str, str]
"""Contents by path, relative to the output folder."""


def render_kuberay(
    recipe: Recipe, recipe_text: str, values: Values, overrides: Sequence[str] = ()
) -> Files:
    """KubeRay's objects as kustomize folders.

    Args:
        recipe_text: the recipe's file, which the cluster reads with the same `overrides`.

    Raises:
        ValueError: values or recipe can't be used there; the message says what would help.
    """
    kubernetes = values.kubernetes
    if kubernetes is None:
        raise ValuesError("target kuberay needs the values' section kubernetes, which is missing")
    folder = kubernetes.shared_folder
    require_reachable(recipe, None if folder is None else folder.path)
    demands = [demand(recipe, values, stage) for stage in STAGES]
    files = {f"base/{_RECIPE}": recipe_text, **_base(recipe, values, kubernetes)}
    for needed in demands:
        job = kuberay.ray_job(recipe, values, kubernetes, needed.stage, overrides)
        name = f"rayjob-{needed.stage}.yaml"
        files |= _folder(needed.stage, name, job, kubernetes, needed)
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
        foreign = path.is_file() and not path.read_text().startswith(_HEADER)
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
