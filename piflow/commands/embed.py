"""Prompts -> embedding store: see `piflow.data.embed`, which this gives its Ray session."""

from __future__ import annotations

from piflow.config import Recipe
from piflow.data.manifest import StoreManifest


def main(recipe: Recipe, *, show_progress: bool = True) -> StoreManifest:
    """Encode the recipe's prompts and write the embedding store.

    Raises:
        as `piflow.data.embed.embed_prompts`.
    """
    from piflow.data.embed import embed_prompts
    from piflow.runtime.session import ray_session

    return embed_prompts(recipe, ray_session, show_progress=show_progress)


def prepare_online(
    recipe: Recipe, *, evaluation: bool = False, show_progress: bool = True
) -> StoreManifest:
    """Embed what an online run needs before it starts.

    Args:
        evaluation: whether the evaluation prompts, or those of the pictures drawn along a run.

    Raises:
        as `piflow.data.embed.embed_prompts`.
    """
    from piflow.data import embed
    from piflow.runtime.session import ray_session

    return embed.prepare_online(
        recipe, ray_session, evaluation=evaluation, show_progress=show_progress
    )


def verify(recipe: Recipe) -> None:
    """Read every file of the recipe's store and compare it with the manifest; print the result.

    Raises:
        as `piflow.data.embed.verify`.
    """
    from piflow.data import embed

    embed.verify(recipe)
