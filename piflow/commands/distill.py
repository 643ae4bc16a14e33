"""recipe -> a student: Ray Data streams the store into Ray Train workers, which distil."""

from __future__ import annotations

from piflow.config import Recipe


def main(recipe: Recipe, *, show_progress: bool = True) -> int:
    """Start the run, or go on with it from its last checkpoint.

    Returns:
        The number of optimiser steps done.

    Raises:
        ValueError: the recipe's objective, store or run directory doesn't fit.
    """
    recipe.distillation()
    from piflow.commands import embed
    from piflow.runtime.driver import train

    if recipe.embed.mode == "online":
        embed.prepare_online(recipe, show_progress=show_progress)
    return train(recipe, show_progress=show_progress)
