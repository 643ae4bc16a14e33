"""Which sizes of pictures a recipe's model takes: whole tokens, each a patch of latent pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from piflow import storage
from piflow.config.family import find_family
from piflow.config.section import RecipeError
from piflow.storage.foreign import ForeignDataError, parse_object
from piflow.storage.uri import local_path

if TYPE_CHECKING:
    from piflow.config.recipe import Recipe

PIXEL_FACTOR = 2
"""Pixels that a latent pixel is wide, where `model.codec` is pixels."""

_MAX_CONFIG = 2**20  # bytes of a config.json


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels that a latent pixel of a VAE is wide, by its config.json.

    Raises:
        LookupError, TypeError: it says nothing of that.
    """
    if "temperal_downsample" in config:  # AutoencoderKLQwenImage
        return int(2 ** len(config["temperal_downsample"]))
    return int(2 ** (len(config["block_out_channels"]) - 1))


def check_size(height: int, width: int, step: int) -> None:
    """Refuses a picture that isn't of whole tokens.

    Args:
        height, width: pixels.
        step: pixels that a token is wide and high.

    Raises:
        ValueError: it isn't.
    """
    if height <= 0 or width <= 0 or height % step or width % step:
        raise ValueError(
            f"picture sizes must be positive multiples of {step} pixels, got {height}×{width}"
        )


def check_sizes(recipe: Recipe) -> None:
    """Refuses sizes that the recipe names and its model doesn't take.

    With a VAE they are checked where its config.json is on this machine; before a run starts they
    are in any case.

    Raises:
        RecipeError: names the key.
    """
    factor = PIXEL_FACTOR if recipe.model.codec == "pixels" else _local_factor(recipe)
    if factor is None:
        return
    step = find_family(recipe.model.family).patch_size * factor
    for key, (height, width) in _sizes(recipe):
        try:
            check_size(height, width, step)
        except ValueError as error:
            raise RecipeError(
                f"{key}: {error} (model.family = {recipe.model.family} with model.codec = "
                f"{recipe.model.codec})"
            ) from error


def _sizes(recipe: Recipe) -> Iterator[tuple[str, tuple[int, int]]]:
    embed = recipe.embed
    yield "embed.height and embed.width", (embed.height, embed.width)
    for number, (height, width) in enumerate(embed.buckets):
        yield f"embed.buckets.{number}", (height, width)
    for number, (height, width) in enumerate(embed.condition_sizes):
        yield f"embed.condition_sizes.{number}", (height, width)


def _local_factor(recipe: Recipe) -> int | None:
    """Of the VAE, if its config.json is a file of this machine that says it."""
    try:
        uri = recipe.model.vae or storage.sibling(recipe.model.path, "vae")
        if storage.scheme(uri) != "file":
            return None
        path = local_path(uri) / "config.json"
        with path.open("rb") as file:  # pyarrow, which reads all else, takes long to import
            return vae_factor(parse_object(file.read(_MAX_CONFIG), where=str(path)))
    except (ForeignDataError, LookupError, OSError, TypeError, ValueError):
        return None  # told by whoever opens it
