"""Tiny random models of any family, saved as users have theirs: to try a recipe without the real.

Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from piflow.backbones.tiny import STD, TinyEncoder, TinyModel
from piflow.config import EncoderConfig, ModelConfig, find_family
from piflow.config.family import resolve

PICTURE_MULTIPLE = 4  # pixels; both codecs halve a picture, and the backbones take 2×2 patches


def save_model(
    folder: Path,
    model: ModelConfig,
    encoder: EncoderConfig,
    *,
    size: int,
    guidance_embeds: bool = False,
    seed: int = 0,
) -> None:
    """Write a model folder that a recipe's `model` and `encoder` sections fit.

    ::

        transformer  vae  text_encoder  tokenizer  text_encoder_2  tokenizer_2  scheduler
        model_index.json                                        as far as the family has them

    With an encoder that no diffusers pipeline has, such as BERT, model and tokenizer are in
    `encoder`, and there are no index and no scheduler. The same arguments give the same weights.

    Args:
        folder: a local folder.
        size: pixels of the pictures' sides; DiT's latents have this one size.
        guidance_embeds: whether a FLUX takes an embedded guidance.
        seed: of the weights.

    Raises:
        ValueError: `size` isn't a positive multiple of `PICTURE_MULTIPLE`, or the family or the
            encoder brings no tiny model.
    """
    if size <= 0 or size % PICTURE_MULTIPLE:
        raise ValueError(
            f"expected a positive multiple of {PICTURE_MULTIPLE} pixels as size, got {size}"
        )
    family = find_family(model.family)
    tiny: TinyModel = _tiny(family.tiny, f"model.family = {model.family}", "record")
    texts: TinyEncoder = _tiny(encoder.tiny, f"encoder.type = {encoder.type}", "config class")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = texts.text_parts(encoder)
        parts.append(("transformer", tiny.transformer(model, encoder, size, guidance_embeds)))
        for _, part in parts:
            if isinstance(part, nn.Module):
                _randomise(part)
        if model.codec == "vae":  # whose fresh weights give pictures that differ
            parts.append(("vae", tiny.vae(size)))
    if model.codec == "vae" and encoder.in_pipeline:
        tiny.pipeline(dict(parts)).save_pretrained(str(folder))
        return
    for name, part in parts:
        part.save_pretrained(str(folder / name))


def _tiny(module: str | None, whose: str, place: str) -> Any:
    if module is None:
        raise ValueError(
            f"{whose} has no tiny random model, which piflow smoke runs; name its module as `tiny` "
            f"in the {place}"
        )
    return resolve(module)


def _randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "norm" not in name or parameter.ndim > 1:
            nn.init.normal_(parameter, std=STD)
