"""recipe and values -> the files that run it on a cluster; nothing is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from piflow.config import Recipe


def main(
    recipe: Recipe, recipe_text: str, *, values: Path, out: Path, overrides: Sequence[str] = ()
) -> list[Path]:
    """Write KubeRay's files for a recipe.

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
    from piflow.jobs.render import render_kuberay, write
    from piflow.jobs.values import load_values

    files = render_kuberay(recipe, recipe_text, load_values(values), overrides)
    write(files, out)
    print(f"{recipe.name}: {len(files)} files in {out}; docs/kubernetes.md says how to use them")
    return [out / name for name in files]
