"""A recipe's backbone, by its family."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from piflow.backbones.base import Backbone
from piflow.config import ModelConfig, find_family
from piflow.config.family import resolve
from piflow.sharding.weights import StoredTensor

AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def family_class(family: str) -> type[Backbone]:
    """The backbone class of `model.family`.

    Raises:
        ValueError: there is no such family, or its record's class can't be imported.
    """
    backbone_class: type[Backbone] = resolve(find_family(family).backbone)
    return backbone_class


def load_backbone(
    model: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    embedded_guidance: float | None = None,
) -> Backbone:
    """The recipe's transformer as it is on disk: the teacher, with no adapters.

    Raises:
        ValueError: a folder that isn't this family's model, or guidance that doesn't fit it.
    """
    backbone = family_class(model.family).load(
        model.path,
        dtype=DTYPES[model.dtype],
        device=device,
        embedded_guidance=embedded_guidance,
    )
    return with_frames(backbone, model)


def load_empty_backbone(
    model: ModelConfig, *, embedded_guidance: float | None = None
) -> tuple[Backbone, dict[nn.Parameter, StoredTensor]]:
    """`load_backbone`, less the weights: parameters on "meta", and where their values lie.

    Raises:
        ValueError: as `load_backbone`.
    """
    backbone, sources = family_class(model.family).load_empty(
        model.path, dtype=DTYPES[model.dtype], embedded_guidance=embedded_guidance
    )
    return with_frames(backbone, model), sources


def with_frames(backbone: AnyBackbone, model: ModelConfig) -> AnyBackbone:
    """The same backbone, told how many frames the latents of the recipe's videos hold."""
    backbone.latent_frames = model.latent_frames
    return backbone
