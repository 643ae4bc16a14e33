"""Encodes with the recipe's text encoder, in actors that may die so often and no more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from piflow.backbones.encoders import build_encoder
from piflow.backbones.text import EncodedPrompt, TextEncoder
from piflow.config import EmbedConfig, Recipe
from piflow.data.background import remote_cause
from piflow.data.layout import ShardPlan
from piflow.data.manifest import StoreInputs
from piflow.data.prompts import Prompt
from piflow.storage.foreign import shown

if TYPE_CHECKING:
    import ray.data
    from torch import Tensor

MAX_RETRIES = 3  # of a piece of work whose encoder died

MAX_RESTARTS = 16  # of an encoder, machines that were taken away not counted


class EncoderDiedError(ChildProcessError):
    """An encoder's process died again and again at the same piece of work."""


def on_encoders(
    source: ray.data.Dataset,
    actor: type,
    arguments: tuple[Any, ...],
    embed: EmbedConfig,
    compute: ray.data.ActorPoolStrategy,
) -> ray.data.Dataset:
    """A dataset whose items, one at a time, go through encoder actors.

    Ray Data alone would restart an actor without end that dies at every try, as one does that the
    kernel kills for its memory.

    Args:
        arguments: of the actor's constructor.
        compute: how many actors there are.
    """
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        # how often an actor may die has no other parameter than the deprecated ones
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return source.map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=1,
            batch_format="numpy",
            compute=compute,
            num_cpus=1,
            num_gpus=embed.gpus_per_encoder,
            max_task_retries=MAX_RETRIES,
            max_restarts=MAX_RESTARTS,
        )


def what_failed(error: BaseException, embed: EmbedConfig, where: str, then: str) -> BaseException:
    """An error of our code in an encoder; or that Ray has given up, since its process always ends.

    Args:
        error: Ray's.
        where: at which piece of work ("at shard-00001.parquet").
        then: what to do once that is put right.
    """
    from ray.exceptions import RayActorError

    if not isinstance(error, RayActorError) or error.actor_init_failed:
        return remote_cause(error)
    reason = shown(" ".join(str(error).split()), 300)
    return EncoderDiedError(
        f"an encoder's process died {MAX_RETRIES + 1} times in a row ({where}): {reason}. "
        "Most often its machine had too little memory: lower embed.batch_size "
        f"({embed.batch_size}), embed.rows_per_shard ({embed.rows_per_shard}) or embed.encoders "
        f"({embed.encoders}), or give it a larger machine. {then}"
    )


def encode_row_groups(
    plan: ShardPlan,
    encode: Callable[..., Iterator[tuple[list[int], list[Any]]]],
    picture: Callable[[Prompt], Tensor] | None = None,
) -> Iterator[tuple[list[int], list[EncodedPrompt]]]:
    """Encoder calls of one file: (indices of prompts, their results), row group by row group.

    Prompts of two row groups never share a call, so a row group's content depends on its own
    prompts alone.

    Args:
        encode: prompts -> encoder calls, as `TextEncoder.encode_by_length`.
        picture: reads the picture that is to be edited, for an encoder that reads it as well.
    """
    start = 0
    for prompts in plan.prompts_by_group():
        texts = [prompt.text for prompt in prompts]
        if picture is None:
            calls = encode(texts)
        else:
            calls = encode(texts, pictures=[partial(picture, prompt) for prompt in prompts])
        for rows, results in calls:
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
