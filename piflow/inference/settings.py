"""Students as files: from a checkpoint, to and from an exported adapter."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from piflow import storage
from piflow.backbones import Conditioning, load_backbone
from piflow.backbones.encoders import build_encoder
from piflow.config import FamilyEncoder, ModelConfig, Recipe, identity, require_known
from piflow.roles.adapter import Adapter, load_adapter
from piflow.roles.trio import Trio
from piflow.schedule import FewStep

SETTINGS_KEY = "piflow_settings"

Weights = Literal["ema", "student"]

SECTIONS = {"ema": "ema", "student": "trainable"}


class SamplingSettings(BaseModel):
    """What sampling needs beside the weights; kept in the safetensors metadata as JSON.

    There the schedule's numbers are keys beside the others, and the schema version tells how
    `model` and `encoder` are meant; version 0.1.0 wrote none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig  # the base and its codec, with absolute URIs
    encoder: FamilyEncoder  # with an absolute URI
    height: int  # pixels
    width: int
    few_step: FewStep
    embedded_guidance: float | None  # FLUX.1-dev's guidance input

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, data: Any) -> Any:
        """Gathers the schedule's keys, and brings the recipe's to today's schema."""
        if not isinstance(data, dict) or "few_step" in data:
            return data
        names = {field.name for field in fields(FewStep)}
        few_step = {name: value for name, value in data.items() if name in names}
        others = {name: value for name, value in data.items() if name not in names}
        parts = {name: others[name] for name in ("model", "encoder") if name in others}
        migrated = identity.migrate(parts, others.pop(identity.VERSION_KEY, 0))
        return {**others, **{name: migrated[name] for name in parts}, "few_step": few_step}

    @model_serializer(mode="wrap")
    def _flatten(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The inverse of `_nest`."""
        tree: dict[str, Any] = serialise(self)
        few_step = tree.pop("few_step")
        return {identity.VERSION_KEY: identity.SCHEMA, **tree, **few_step}

    @classmethod
    def of(cls, recipe: Recipe) -> SamplingSettings:
        """The recipe's.

        Raises:
            ValueError: the recipe distils nothing.
        """
        return cls(
            model=_absolute_model(recipe.model),
            encoder=recipe.encoder.absolute(),
            height=recipe.embed.height,
            width=recipe.embed.width,
            few_step=FewStep.of(recipe.distillation()),
            embedded_guidance=recipe.guidance.embedded,
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
    _require_known_family(text, where)
    try:
        return SamplingSettings.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise ValueError(
            f"{where}: {SETTINGS_KEY} are not those of this piflow ({place}: {first['msg']}): "
            "export it again"
        ) from error


def _require_known_family(text: str, where: str) -> None:
    """Before the settings are read, which looks the family up."""
    try:
        family = json.loads(text)["model"].get("family")
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # refused for that by whoever reads it whole
    if isinstance(family, str):
        require_known(family, where)


def load_student(folder: str, base: str | None = None) -> tuple[Trio, SamplingSettings]:
    """Teacher and student from an adapter folder, on the CPU, ready to sample.

    Args:
        base: URI of the base model; default: the one that the student was made from.

    Returns:
        The trio, and the settings with the base that was loaded.

    Raises:
        ValueError: not an adapter folder, or one of another base.
    """
    adapter, settings = read_adapter(folder, base)
    return student_of(adapter, settings), settings


def read_adapter(
    folder: str, base: str | None = None, dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[Adapter, SamplingSettings]:
    """An adapter folder, and the settings to sample with; no model is loaded.

    Args:
        base: URI of the base model; default: the one that the student was made from.
        dtype: what the base computes in; default: as in training.

    Raises:
        ValueError: not an adapter folder.
    """
    adapter = load_adapter(folder)
    settings = settings_of(adapter, folder)
    changes = {"path": base, "dtype": dtype}
    given = {name: value for name, value in changes.items() if value is not None}
    model = settings.model.model_copy(update=given)
    return adapter, settings.model_copy(update={"model": model})


def student_of(adapter: Adapter, settings: SamplingSettings) -> Trio:
    """Teacher and student of an adapter on the CPU, the base read from where the settings say.

    Raises:
        ValueError: a base that isn't the family's model, or another one than the adapter's.
    """
    backbone = load_backbone(settings.model, embedded_guidance=settings.embedded_guidance)
    return Trio.from_adapter(backbone, adapter)


def encode_prompts(
    settings: SamplingSettings, prompts: list[str], device: str = "cpu"
) -> Conditioning:
    """Conditioning of free prompts by the student's own text encoder, on the CPU.

    Args:
        device: where the encoder runs.

    Raises:
        ValueError: the encoder doesn't load, or can't take a prompt.
    """
    encoder = build_encoder(settings.encoder, device)
    encoded = encoder.encode(prompts)
    identity = encoder.identity
    tokens = torch.zeros(len(prompts), identity.max_tokens, identity.hidden_size)
    for row, prompt in zip(tokens, encoded, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    pooled = [prompt.pooled for prompt in encoded if prompt.pooled is not None]
    return Conditioning(
        tokens,
        torch.tensor([len(prompt.tokens) for prompt in encoded]),
        torch.stack(pooled) if pooled else None,
    )


def _absolute_model(model: ModelConfig) -> ModelConfig:
    """The same, wherever it is read; a VAE beside the transformer stays where the base is."""
    vae = None if model.vae is None else storage.absolute(model.vae)
    return model.model_copy(update={"path": storage.absolute(model.path), "vae": vae})
