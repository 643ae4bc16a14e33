"""Encodes row groups with the recipe's text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from piflow.backbones.encoders import build_encoder
from piflow.backbones.text import EncodedPrompt, TextEncoder
from piflow.config import Recipe
from piflow.data.layout import ShardPlan
from piflow.data.manifest import StoreInputs


def encode_row_groups(
    plan: ShardPlan, encode: Callable[[Sequence[str]], Iterator[tuple[list[int], list[Any]]]]
) -> Iterator[tuple[list[int], list[EncodedPrompt]]]:
    """Encoder calls of one file: (indices of prompts, their results), row group by row group.

    Prompts of two row groups never share a call, so a row group's content depends on its own
    prompts alone.

    Args:
        encode: prompts -> encoder calls, as `TextEncoder.encode_by_length`.
    """
    start = 0
    for prompts in plan.prompts_by_group():
        for rows, results in encode([prompt.text for prompt in prompts]):
            yield [start + row for row in rows], results
        start += len(prompts)


def load_encoder(recipe: Recipe, inputs: StoreInputs) -> TextEncoder:
    """The recipe's encoder, in an encoder actor.

    Raises:
        ValueError: it isn't the one that the driver found.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    encoder = build_encoder(recipe.encoder, "cuda" if recipe.embed.gpus_per_encoder else "cpu")
    if encoder.identity != inputs.encoder:
        raise ValueError(
            f"the recipe's encoder is {encoder.identity} on this node, but {inputs.encoder} on the "
            "driver's; put the same files on all nodes"
        )
    return encoder
