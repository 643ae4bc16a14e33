"""A recipe's embedding store, by the embed job's own parts in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from piflow.backbones.encoders import build_encoder
from piflow.config import Recipe
from piflow.data import embed
from piflow.data.layout import recipe_prompts
from piflow.data.manifest import write_manifest
from piflow.data.pictures import ConditionEncoder, LatentEncoder
from piflow.data.reader import EmbeddingStore
from piflow.data.writer import reusable_shard, write_shard
from piflow.progress import PlainConsole


def embed_here(recipe: Recipe, encode: Callable[..., Any] | None = None) -> EmbeddingStore:
    """Writes and opens it; each shard is found again as one that needn't be made anew.

    Args:
        encode: in place of the recipe's encoder's `encode_by_length`.
    """
    if encode is None:
        encode = partial(build_encoder(recipe.encoder).encode_by_length, batch_size=4)
        if recipe.encoder.reads_pictures:
            encode = partial(encode, negative=recipe.guidance.negative_prompt)
    job = embed._plan(recipe, recipe_prompts(recipe))
    job = embed._with_condition_sizes(recipe, job, PlainConsole(quiet=True))
    pictures = [LatentEncoder(recipe.model, recipe.embed, "cpu")] if job.inputs.latents else []
    if recipe.condition_sizes is not None:
        pictures.append(ConditionEncoder(recipe.model, recipe.embed, "cpu", recipe.condition_sizes))
    actor = embed.EncodeShard.__new__(embed.EncodeShard)
    reader = embed.picture_reader(recipe)
    actor.__dict__.update(
        _busy=0.0, _pictures=pictures, _encode=encode, _batch_size=4, _picture=reader
    )
    done = {}
    for plan in job.plans:
        rows = actor._encode_shard(plan)
        while True:
            try:
                next(rows)
            except StopIteration as stop:
                left, encoded, skipped = stop.value
                break
        written = write_shard(job.store, left, encoded, job.inputs, skipped)
        assert reusable_shard(job.store, plan, job.inputs, job.buckets) == written
        done[plan.path] = embed._Finished(*written)
    write_manifest(job.store, embed._to_manifest(job, done, ()))
    return EmbeddingStore.open(job.store)
