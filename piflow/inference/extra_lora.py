"""LoRA of somebody else's beside a student's: a style, say, at a strength.

A student's LoRA and others add up, layer by layer: W x + B A x + s B' A' x. So they are one LoRA,
whose A are stacked on one another and whose B stand beside one another, and a student with more of
them is an adapter like any other. A fully trained student has no LoRA; there the others go into its
weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from piflow import storage
from piflow.inference.places import on_hub
from piflow.inference.settings import SamplingSettings, empty_model
from piflow.roles.adapter import HEAD_LAYERS, PREFIX, Adapter
from piflow.roles.lora import ranks_of
from piflow.roles.merged import for_backbone
from piflow.roles.teacher_lora import read_lora
from piflow.storage.foreign import shown
from piflow.storage.tensor_file import read_header

_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of it
_HEADS = tuple(f"{layer}." for layers in HEAD_LAYERS.values() for layer in layers)
_STRENGTH = re.compile(r"(?P<place>.+)@(?P<strength>[-+]?(\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class ExtraLora:
    """A LoRA file, or a folder or repository that holds one, and how strongly it counts."""

    place: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ExtraLora:
        """``URI`` or ``URI@0.8``; a number after the last ``@`` is a strength, no revision.

        Raises:
            ValueError: no place, or a strength that isn't a finite number.
        """
        match = _STRENGTH.fullmatch(text)
        place, strength = (text, 1.0) if match is None else (match[1], float(match["strength"]))
        if not place or not math.isfinite(strength):
            raise ValueError(f"expected a LoRA as URI or URI@STRENGTH, got {shown(repr(text))}")
        return cls(place, strength)

    @property
    def file(self) -> str:
        """URI of its safetensors file.

        Raises:
            ValueError: the place holds none, or several and none of diffusers' name.
        """
        uri = on_hub(self.place)
        if uri.endswith(".safetensors"):
            return uri
        names = storage.list_files(uri, recursive=False)
        found = [name for name in names if name.endswith(".safetensors")]
        if len(found) != 1 and _FILE not in found:
            told = ", ".join(map(shown, found[:10])) or "none"
            raise ValueError(f"expected one safetensors file in {uri}, found {told}: name the file")
        return storage.join(uri, _FILE if _FILE in found else found[0])


def with_extra_lora(
    adapter: Adapter, settings: SamplingSettings, extra: Sequence[ExtraLora]
) -> Adapter:
    """The student with more LoRA on it. Of the base only its configuration is read.

    Raises:
        ValueError: a file that isn't LoRA of this family's transformer, or that adapts layers which
            the base lacks or the student has replaced.
        OSError: a place that can't be read.
    """
    if not extra:
        return adapter
    backbone = empty_model(adapter, settings)
    for_backbone(adapter, backbone).check_fits(backbone)
    layers = {
        name: layer
        for name, layer in backbone.module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    tensors = dict(adapter.tensors)
    for item in extra:
        added = _read(item, settings.model.family)
        _check_layers(added, layers, backbone.output_names, item.place)
        add = _into_weights if adapter.is_full_model else _beside
        add(tensors, added, item.strength)
    return replace(adapter, tensors=tensors)


def _read(extra: ExtraLora, family: str) -> dict[str, Tensor]:
    """Its tensors by the transformer's own names, with alpha = rank.

    Raises:
        ValueError: no file, no LoRA, LoRA of other models than the transformer, or a student's
            adapter.
    """
    file = extra.file
    head = next((name for name in read_header(file).tensors if _is_head(name)), None)
    if head is not None:
        raise ValueError(
            f"{extra.place} holds {shown(head)}, a student's output layer: it is an adapter of its "
            "own and no LoRA to add; one student samples at a time"
        )
    return read_lora(file, family)


def _is_head(name: str) -> bool:
    return ".lora_" not in name and name.removeprefix(PREFIX).startswith(_HEADS)


def _check_layers(
    added: Mapping[str, Tensor],
    layers: Mapping[str, nn.Linear],
    replaced: Sequence[str],
    place: str,
) -> None:
    """Refuses LoRA on layers that aren't there, have other sizes, or that the student replaced."""
    for name in ranks_of(added):
        if name in replaced or name.startswith(tuple(f"{part}." for part in replaced)):
            raise ValueError(
                f"{place} adapts {shown(name)}, the teacher's output layer, which the student has "
                "replaced by its own: LoRA on it can't be added"
            )
        layer = layers.get(name)
        if layer is None:
            raise ValueError(
                f"{place} adapts {shown(name)}, which is no linear layer of the base: it was made "
                "for another model"
            )
        sizes = (added[f"{name}.lora_B.weight"].shape[0], added[f"{name}.lora_A.weight"].shape[1])
        if sizes != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{place}: LoRA of {shown(name)} is for a layer {sizes[1]} -> {sizes[0]}, the "
                f"base's is {layer.in_features} -> {layer.out_features}: it was made for another "
                "model"
            )


def _beside(tensors: dict[str, Tensor], added: Mapping[str, Tensor], strength: float) -> None:
    """Adds to a LoRA student's LoRA."""
    for name in ranks_of(added):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        more = {down: added[down].float(), up: strength * added[up].float()}
        if down in tensors:
            more[down] = torch.cat([tensors[down].float(), more[down]], dim=0)
            more[up] = torch.cat([tensors[up].float(), more[up]], dim=1)
        tensors |= more


def _into_weights(tensors: dict[str, Tensor], added: Mapping[str, Tensor], strength: float) -> None:
    """Adds to a fully trained student's weights."""
    for name in ranks_of(added):
        down, up = added[f"{name}.lora_A.weight"].float(), added[f"{name}.lora_B.weight"].float()
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() + strength * up @ down
