"""Sizes of a recipe's pictures and prompts, as the model sees them."""

from __future__ import annotations

from piflow.config import Recipe, find_family
from piflow.config.family import resolve

_LATENT_PIXEL = {"pixels": 2, "vae": 8}  # side in picture pixels


def latent_size(recipe: Recipe) -> tuple[int, int]:
    """Latent pixels, (height, width), of the largest picture that the recipe names.

    Of a video the height is that of all frames of its latents.
    """
    embed = recipe.embed
    sizes = [(embed.height, embed.width), *((bucket[0], bucket[1]) for bucket in embed.buckets)]
    height, width = _latents_of(recipe, max(sizes, key=lambda size: size[0] * size[1]))
    return recipe.model.latent_frames * height, width


def _latents_of(recipe: Recipe, size: tuple[int, int]) -> tuple[int, int]:
    """Those of a picture of this size in pixels, rounded up to whole patches."""
    height, width = size
    side = _LATENT_PIXEL[recipe.model.codec]
    patch = _patch(recipe)
    whole = patch * side
    return -(-height // whole) * patch, -(-width // whole) * patch


def condition_size(recipe: Recipe) -> tuple[int, int] | None:
    """Latent pixels, (height, width), of the largest picture to be edited; None: there are none."""
    if recipe.condition_sizes is None:
        return None
    return _latents_of(recipe, recipe.condition_sizes.largest())


def tokens_of(recipe: Recipe) -> int:
    """Tokens of a sample: the largest picture's, those of one to be edited, and the text's."""
    sizes = (latent_size(recipe), condition_size(recipe))
    pixels = sum(size[0] * size[1] for size in sizes if size is not None)
    return pixels // _patch(recipe) ** 2 + recipe.encoder.text_tokens


def _patch(recipe: Recipe) -> int:
    """Side of a token in latent pixels."""
    side: int = resolve(find_family(recipe.model.family).backbone).patch_size
    return side
