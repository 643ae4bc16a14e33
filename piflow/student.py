"""Students as files: from a checkpoint, to and from an exported adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from piflow import storage
from piflow.adapter import Adapter, load_adapter, save_adapter
from piflow.backbones import Conditioning, load_backbone
from piflow.checkpoint import RunState, load_state, load_tensors
from piflow.config import ModelConfig, PiIDConfig, Recipe
from piflow.data.encoders import BertEncoder
from piflow.trio import Trio

SETTINGS_KEY = "piflow_settings"
Weights = Literal["ema", "student"]
_SECTIONS = {"ema": "ema", "student": "trainable"}


@dataclass(frozen=True)
class SamplingSettings:
    """What sampling needs beside the weights; kept in the safetensors metadata as JSON."""

    family: Literal["flux"]
    codec: Literal["pixels"]
    encoder: str  # URI of the text encoder
    max_tokens: int
    height: int  # pixels
    width: int
    nfe: int
    final_step_size_scale: float
    shift: float
    total_substeps: int
    embedded_guidance: float | None = None  # FLUX.1-dev's guidance input


def student_of_checkpoint(
    recipe: Recipe, checkpoint: str, weights: Weights
) -> tuple[Trio, RunState]:
    """Teacher and student with a checkpoint's weights, on the CPU, ready to sample.

    Raises:
        ValueError: no finished checkpoint there, or one of another recipe.
    """
    folder = storage.local_folder(checkpoint)
    state = load_state(folder)
    if state.recipe_hash != recipe.hash():
        raise ValueError(
            f"checkpoint {checkpoint} was written by recipe {state.recipe_hash}, this one is "
            f"{recipe.hash()}; use the recipe that wrote it"
        )
    trio = Trio.build(
        recipe.model,
        recipe.lora,
        recipe.policy,
        generator=torch.Generator().manual_seed(recipe.seed),
        embedded_guidance=recipe.guidance.embedded,
    )
    trio.load_student(load_tensors(folder, _SECTIONS[weights]))
    return trio.train(False), state


def export_adapter(
    recipe: Recipe,
    checkpoint: str,
    folder: str,
    *,
    weights: Weights,
    dtype: Literal["float32", "float16", "bfloat16"],
    lineage: dict[str, str],
) -> None:
    """Write a checkpoint as an adapter folder in the published format.

    Args:
        lineage: strings for the metadata: run, hashes, step.

    Raises:
        ValueError: the recipe distils nothing, or the checkpoint doesn't fit it.
    """
    objective = recipe.objective
    if not isinstance(objective, PiIDConfig):
        raise ValueError(f"expected a recipe with objective.type pi_id, got {objective.type}")
    trio, _ = student_of_checkpoint(recipe, checkpoint, weights)
    settings = SamplingSettings(
        family=recipe.model.family,
        codec=recipe.model.codec,
        encoder=storage.absolute(recipe.encoder.path),
        max_tokens=recipe.encoder.max_tokens,
        height=recipe.embed.height,
        width=recipe.embed.width,
        nfe=objective.nfe,
        final_step_size_scale=objective.final_step_size_scale,
        shift=objective.shift,
        total_substeps=objective.total_substeps,
        embedded_guidance=recipe.guidance.embedded,
    )
    tensors: dict[str, Tensor] = {
        name: parameter.detach() for name, parameter in trio.trainable_parameters().items()
    }
    save_adapter(
        folder,
        trio.backbone,
        tensors,
        recipe.policy,
        base_model=storage.absolute(recipe.model.path),
        metadata={SETTINGS_KEY: json.dumps(asdict(settings)), **lineage},
        dtype=dtype,
    )


def settings_of(adapter: Adapter, where: str) -> SamplingSettings:
    """The sampling settings in an adapter's metadata.

    Raises:
        ValueError: the file was not written by piflow, or by another version.
    """
    text = adapter.metadata.get(SETTINGS_KEY)
    if text is None:
        raise ValueError(
            f"{where} carries no {SETTINGS_KEY}: it was not exported by piflow, which notes the "
            "encoder, picture size and schedule there"
        )
    try:
        return SamplingSettings(**json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{where}: {SETTINGS_KEY} are not those of this piflow ({error}): export it again"
        ) from error


def load_student(folder: str, base: str | None = None) -> tuple[Trio, SamplingSettings]:
    """Teacher and student from an adapter folder, on the CPU, ready to sample.

    Args:
        base: URI of the base model; default: the one in the adapter's metadata.

    Raises:
        ValueError: not an adapter folder, or one of another base.
    """
    adapter = load_adapter(folder)
    settings = settings_of(adapter, folder)
    path = base or adapter.metadata["base_model"]
    backbone = load_backbone(
        ModelConfig(family=settings.family, path=path, codec=settings.codec),
        embedded_guidance=settings.embedded_guidance,
    )
    return Trio.from_adapter(backbone, adapter), settings


def encode_prompts(settings: SamplingSettings, prompts: list[str]) -> Conditioning:
    """Conditioning of free prompts by the student's own text encoder."""
    encoder = BertEncoder(settings.encoder, settings.max_tokens)
    encoded = encoder.encode(prompts)
    tokens = torch.zeros(len(prompts), settings.max_tokens, encoded[0].tokens.shape[1])
    for row, prompt in zip(tokens, encoded, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    return Conditioning(
        tokens,
        torch.tensor([len(prompt.tokens) for prompt in encoded]),
        torch.stack([prompt.pooled for prompt in encoded]),
    )
