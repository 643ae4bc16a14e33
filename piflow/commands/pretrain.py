"""recipe -> a small teacher: flow matching on pictures, through the trainer that distils.

The finished model is written to RUN_DIR/teacher as a diffusers folder in float16, the EMA weights.
"""

from __future__ import annotations

from piflow.config import FlowMatchingConfig, Recipe


def main(recipe: Recipe, *, show_progress: bool = True) -> int:
    """Start pre-training, or go on with it; export the teacher when the last step is done.

    Returns:
        The number of optimiser steps done.

    Raises:
        ValueError: the recipe's objective, store or run directory doesn't fit.
    """
    if not isinstance(recipe.objective, FlowMatchingConfig):
        raise ValueError(
            f"piflow pretrain expects objective.type flow_matching, the recipe has "
            f"{recipe.objective.type}; use `piflow distill`"
        )
    from piflow.commands import embed
    from piflow.runtime.driver import train
    from piflow.training.export import export_teacher

    if recipe.embed.mode == "online":
        embed.prepare_online(recipe, show_progress=show_progress)
    steps = train(recipe, show_progress=show_progress)
    folder = export_teacher(recipe)
    print(f"teacher written to {folder}")
    return steps
