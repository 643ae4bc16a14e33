"""Every check of a recipe against its store, encoder and model, before anything starts."""

from __future__ import annotations

from piflow import storage
from piflow.config import Recipe
from piflow.data.reader import EmbeddingStore


def check_store(recipe: Recipe, *, evaluation: bool = False) -> EmbeddingStore:
    """Open the recipe's store and make sure that it, encoder and VAE go with the recipe's model.

    Args:
        evaluation: see `open_store`.

    Raises:
        ValueError: no store, a damaged one, one of another encoder, or one without the recipe's
            negative prompt or, where it trains on them, latents of its VAE; another family's VAE,
            or one that makes other latents than the model takes.
    """
    from piflow.backbones.codec import build_codec, check_channels
    from piflow.backbones.encoders import encoder_identity
    from piflow.data.online import open_store
    from piflow.data.pictures import codec_identity
    from piflow.training.context_parallel import check_pictures

    codec = build_codec(recipe.model)
    check_channels(recipe.model, codec)
    store = open_store(recipe, evaluation=evaluation)
    store.require_encoder(encoder_identity(recipe.encoder))
    store.require_negative_prompt(recipe.guidance.negative_prompt)
    if recipe.objective.pictures == "store":
        store.require_latents(codec_identity(recipe.model))
    sizes = [(bucket.height, bucket.width) for bucket in store.manifest.buckets]
    sizes.append((recipe.embed.height, recipe.embed.width))  # of samples
    check_pictures(codec, sizes, recipe.runtime.context_parallel)
    return store


def absolute_recipe(recipe: Recipe) -> Recipe:
    """Workers have other working directories: make local paths absolute."""
    from piflow.backbones.codec import absolute_paths
    from piflow.backbones.encoders import absolute_path

    uris = {key: storage.absolute(getattr(recipe.embed, key)) for key in ("store", "prompts")}
    embed = recipe.embed.model_copy(update=uris)
    return recipe.model_copy(
        update={
            "run_dir": storage.absolute(recipe.run_dir),
            "embed": embed,
            "encoder": absolute_path(recipe.encoder),
            "model": absolute_paths(recipe.model),
        }
    )
