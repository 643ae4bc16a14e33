"""Prompts -> embedding store: see `piflow.data.embed`, which this gives its Ray session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from piflow.config import Recipe
from piflow.data.manifest import StoreManifest

if TYPE_CHECKING:
    from piflow.data.reader import EmbeddingStore


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


def prepare_prompt_set(
    recipe: Recipe, prompts: Sequence[str], folder: str, *, show_progress: bool = True
) -> EmbeddingStore:
    """Embed an evaluation's own prompts, all of one size, into a small store; opens it.

    Args:
        folder: URI of the evaluation's folder.

    Raises:
        as `piflow.data.embed.embed_prompts`.
    """
    from piflow import storage
    from piflow.data.embed import embed_prompts
    from piflow.data.prompt_set import set_recipe
    from piflow.data.prompts import Prompt, PromptSet
    from piflow.data.reader import EmbeddingStore
    from piflow.runtime.session import ray_session

    size = recipe.embed.height, recipe.embed.width
    listed = PromptSet(tuple(Prompt(text, *size) for text in prompts), 0)
    small, content = set_recipe(recipe, listed, folder, "prompts")
    storage.write_bytes(small.embed.prompts, content)
    embed_prompts(small, ray_session, show_progress=show_progress)
    return EmbeddingStore.open(storage.absolute(small.embed.store))


def verify(recipe: Recipe) -> None:
    """Read every file of the recipe's store and compare it with the manifest; print the result.

    Raises:
        as `piflow.data.embed.verify`.
    """
    from piflow.data import embed

    embed.verify(recipe)
