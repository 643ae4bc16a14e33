"""Who started a run with which code, and what it is about, as MLflow's page of it shows them."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from piflow import storage
from piflow.config import PiIDConfig, Recipe
from piflow.storage.foreign import redacted, shown

NOTE = "mlflow.note.content"


def origin() -> dict[str, str]:
    """MLflow's own tags of user, entry point and git commit, and piflow's version.

    There is no commit where piflow was installed from a package.
    """
    command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    name = " ".join([command, *sys.argv[1:2]])
    tags = {
        "mlflow.source.name": shown(name, 200),
        "mlflow.source.type": "LOCAL",
        "piflow.version": version("piflow"),
    }
    return tags | {"mlflow.user": user()} | _commit()


def user() -> str:
    """Whoever runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _commit() -> dict[str, str]:
    """Of the checkout that this file belongs to, if git knows it."""
    try:
        import git

        here = Path(__file__)
        with git.Repo(here.parent, search_parent_directories=True) as repository:
            own = str(here.relative_to(Path(str(repository.working_tree_dir))))
            if not repository.git.ls_files(own):  # somebody's project that holds an environment
                return {}
            return {
                "mlflow.source.git.commit": repository.head.commit.hexsha,
                "mlflow.source.git.dirty": str(repository.is_dirty()).lower(),
            }
    except Exception:  # no git, no checkout, an owner that git distrusts: the run goes on without
        return {}


def readable(recipe: Recipe) -> dict[str, Any]:
    """The keys that tell a run from others: what decides results first, no defaults.

    The whole recipe is the run's artifact ``recipe.yaml``.
    """
    kinds = {"policy": {"type": recipe.policy.type}, "objective": {"type": recipe.objective.type}}
    own = recipe.model_dump(mode="json", exclude_defaults=True)
    return _merged(_merged(kinds, recipe.identity()), own)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees; where both have a value, the first one's."""
    merged = dict(first)
    for key, value in second.items():
        if key in merged and isinstance(merged[key], dict) and isinstance(value, dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged.setdefault(key, value)
    return merged


def description(
    recipe: Recipe,
    manifest_hash: str,
    job: str | None = None,
    figures: Mapping[str, str] = {},
    plan: str = "",
) -> str:
    """Markdown of what was made from what, how well it does and how it ran.

    Args:
        manifest_hash: of the embedding store.
        job: id of the Ray job that the run belongs to.
        figures: what was measured -> the figure, as it shall be read; none: not evaluated yet.
        plan: what was predicted and measured of the training, in Markdown; empty: nothing is known.
    """
    objective = recipe.objective
    if isinstance(objective, PiIDConfig):
        made = (
            f"A student of {objective.nfe} network evaluations ({recipe.policy.type} policy), "
            f"distilled by π-ID from {_code(redacted(recipe.model.path))}."
        )
    else:
        made = f"A teacher in {_code(redacted(recipe.model.path))}, trained by flow matching."
    lines = [
        made,
        "",
        f"* recipe {_code(recipe.name)}, identity {_code(recipe.hash())}: artifact `recipe.yaml`",
        f"* run folder {_code(redacted(storage.absolute(recipe.run_dir)))}",
        f"* embeddings {_code(redacted(storage.absolute(recipe.embed.store)))}, manifest "
        f"{_code(manifest_hash[:16])}",
    ]
    if job is not None:
        lines.append(f"* Ray job {_code(job)}")
    if figures:
        lines += ["", "| measured | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in figures.items()]
        lines += ["", "Report: artifact `evaluation/report.html`."]
    if plan:
        lines += ["", plan, "", "More of it: artifact `plan/plan.md`."]
    return "\n".join(lines)


def _code(text: str) -> str:
    """As Markdown's code: nothing in it is read as Markdown or HTML."""
    return f"`{shown(text, 500).replace('`', ' ')}`"


def _cell(text: str) -> str:
    return shown(text).replace("|", "/").replace("<", "‹").replace("`", " ")
