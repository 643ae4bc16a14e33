"""A recipe made small enough for a smoke test, with its own classes and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from piflow.config import Recipe, TextEncoderConfig, find_family, parse_recipe

STEPS = 2  # optimiser steps of the first run; the resumed one does one more

WORKERS = 2

SEEDS = 2  # pictures a prompt

PROMPTS = "package://piflow.demo/evaluation_prompts.txt"  # emoji names, so all of them drawable

NUM_PROMPTS = 8  # as many as an optimiser step takes

SIDE = 16  # pixels of the longer side

_MULTIPLE = 4  # pixels; see piflow.testing.models

_SIDE_OF_VIDEOS, _MULTIPLE_OF_VIDEOS = 32, 16  # pixels; their pipelines take no other multiples

_FRAMES = 5  # of a video: two of its latents

_MAX_TOKENS = 16

_RANK = 4

MODEL = "model"  # folder of the tiny model


def shrink(
    recipe: Recipe, folder: Path, *, gpus: int, steps: int = STEPS, workers: int = WORKERS
) -> Recipe:
    """The recipe made small, with all paths in `folder`.

    Recipes that differ in `gpus`, `steps` and `workers` alone are one run's.

    Args:
        gpus: of the cluster; without one, or if the recipe uses none, everything runs on CPUs.
        steps: optimiser steps.
        workers: at most; a recipe for one worker keeps to it.

    Raises:
        ValueError: the recipe distils nothing, or has a choice that small sizes don't allow.
    """
    objective = recipe.distillation()
    tree = recipe.model_dump(mode="json")
    tree["run_dir"] = str(folder / "run")
    tree["model"] |= {"path": str(folder / MODEL / "transformer"), "vae": None}
    if find_family(recipe.model.family).video is not None:
        tree["model"]["frames"] = _FRAMES
    tree["encoder"] |= _small_encoder(recipe, folder)
    tree["embed"] |= _small_embed(recipe, folder, gpus)
    if recipe.lora is not None:
        tree["lora"]["rank"] = min(recipe.lora.rank, _RANK)
    tree["training"] |= {
        "steps": steps,
        "batch_size": NUM_PROMPTS,
        "micro_batch_size": 2,  # two a worker and step: gradients are accumulated
        "checkpoint_every": STEPS,
        "log_every": 1,
        "sample_every": min(recipe.training.sample_every, STEPS),
    }
    if tree["training"].get("keep_every") is not None:
        tree["training"]["keep_every"] = STEPS
    # a rate that decays over the run's length would forbid the resumed run its greater length
    tree["training"]["optimizer"] |= {"warmup_steps": 1, "decay_fraction": 0.0}
    tree["training"]["ema"]["start"] = 0
    tree["runtime"] |= _small_runtime(recipe, gpus, workers)
    tree["tracking"] |= {"uri": None, "model_name": None}
    tree["evaluation"] |= {
        "prompts": 2,
        "prompt_list": None,
        "prompt_set": None,
        "seeds": SEEDS,
        "nfe": [],
        "others": [],
        "teacher_steps": objective.nfe + 1,
        "batch_size": 4,
        "workers": _small_evaluation_workers(recipe, tree["runtime"]["num_workers"]),
        "retrieval": False,
        "metrics": [],
        "networks": {},
        "references": None,
    }
    tree["registry"]["gates"] = []  # which may be of what isn't measured any more
    return parse_recipe(tree, f"{recipe.name}, made small,")


def _small_encoder(recipe: Recipe, folder: Path) -> dict[str, Any]:
    encoder = recipe.encoder
    if not isinstance(encoder, TextEncoderConfig):
        return {}
    path = folder / MODEL if encoder.in_pipeline else folder / MODEL / "encoder"
    most = 4 * _MAX_TOKENS if encoder.reads_pictures else _MAX_TOKENS
    return {"path": str(path), "max_tokens": min(encoder.max_tokens, most)}


def _small_embed(recipe: Recipe, folder: Path, gpus: int) -> dict[str, Any]:
    is_video = find_family(recipe.model.family).video is not None
    side, multiple = (_SIDE_OF_VIDEOS, _MULTIPLE_OF_VIDEOS) if is_video else (SIDE, _MULTIPLE)
    height, width = _small_size(recipe.embed.height, recipe.embed.width, side, multiple)
    return {
        "prompts": str(folder / "prompts.jsonl"),
        "store": str(folder / "store"),
        "height": height,
        "width": width,
        "buckets": [_small_size(h, w, side, multiple) for h, w in recipe.embed.buckets],
        "condition_sizes": _small_condition_sizes(recipe),
        "rows_per_shard": NUM_PROMPTS // 2,
        "rows_per_group": 2,
        "batch_size": 4,
        "encoders": [1, 1],
        "gpus_per_encoder": min(recipe.embed.gpus_per_encoder, 1.0) if gpus else 0.0,
    }


def _small_condition_sizes(recipe: Recipe) -> list[list[int]]:
    """A square and a lying one, of a family that edits pictures: batches of each."""
    square = [SIDE, SIDE]
    return [] if recipe.condition_sizes is None else [square, _small_size(2 * SIDE, 3 * SIDE)]


def _small_runtime(recipe: Recipe, gpus: int, workers: int) -> dict[str, Any]:
    runtime = recipe.runtime
    on_gpu = runtime.use_gpu and gpus > 0
    workers = min(workers, runtime.max_workers, gpus if on_gpu else workers)
    tree = runtime.model_dump(mode="json")
    if tree["strategy"] == "auto":  # what it chooses for the real model, not for the tiny one
        tree["strategy"] = "fsdp"
    if tree.get("shard_size") is not None:
        tree["shard_size"] = workers if workers > 1 else None
    return tree | {
        "num_workers": workers,
        "use_gpu": on_gpu,
        "cpus_per_worker": min(runtime.cpus_per_worker, 1.0),
        "max_failures": 0,
    }


def _small_evaluation_workers(recipe: Recipe, training: int) -> int | None:
    asked = recipe.evaluation.workers
    return None if asked is None else min(asked, training)


def _small_size(
    height: int, width: int, longest: int = SIDE, multiple: int = _MULTIPLE
) -> list[int]:
    """Pixels, in about the same ratio."""
    unit = max(height, width) * multiple / longest
    return [max(1, round(side / unit)) * multiple for side in (height, width)]
