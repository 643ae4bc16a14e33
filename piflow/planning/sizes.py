"""Sizes of a recipe's pictures and prompts, as the model sees them."""

from __future__ import annotations

from piflow.config import Recipe, find_family
from piflow.config.family import resolve

_LATENT_PIXEL = {"pixels": 2, "vae": 8}  # side in picture pixels


def latent_size(recipe: Recipe) -> tuple[int, int]:
    """Latent pixels, (height, width), of the largest picture that the recipe names."""
    embed = recipe.embed
    sizes = [(embed.height, embed.width), *((bucket[0], bucket[1]) for bucket in embed.buckets)]
    side = _LATENT_PIXEL[recipe.model.codec]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    patch = _patch(recipe)
    whole = patch * side
    return -(-height // whole) * patch, -(-width // whole) * patch


def tokens_of(recipe: Recipe) -> int:
    """Tokens of a sample: the largest picture's, and the text's."""
    height, width = latent_size(recipe)
    return height * width // _patch(recipe) ** 2 + recipe.encoder.text_tokens


def _patch(recipe: Recipe) -> int:
    """Side of a token in latent pixels."""
    side: int = resolve(find_family(recipe.model.family).backbone).patch_size
    return side
