"""recipe and values -> the files that run it on a cluster; nothing is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from piflow.config import Recipe


def main(
    recipe: Recipe,
    recipe_text: str,
    target: str,
    *,
    values: Path,
    out: Path,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Write a target's files for a recipe.

    Args:
        recipe_text: its file, which the jobs read with the same `overrides`.
        values: the values file.
        out: folder for the files.

    Returns:
        What was written.

    Raises:
        ValueError: recipe and values can't be used or don't fit one another.
        OSError: files that no rendering wrote are in the way.
    """
    from piflow.jobs.render import Job, render, write
    from piflow.jobs.values import load_values

    files = render(Job(recipe, recipe_text, load_values(values), overrides), target)
    write(files, out)
    guide = "kubernetes.md" if target == "kuberay" else "machines.md"
    print(f"{recipe.name}: {len(files)} files in {out}; docs/{guide} says how to use them")
    return [out / name for name in files]
