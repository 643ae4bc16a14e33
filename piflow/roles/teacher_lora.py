"""A teacher that is a base and somebody's LoRA: read from its file, and put onto the base.

    frozen base + LoRA "teacher" ──┬─                    + output layer = teacher
                                   ├─ adapter "student"  + policy head  = student
                                   └─ adapter "ema"      + policy head  = EMA

The LoRA stays beside the base, in its dtype: no weight is copied or rounded again, and shards are
those of the base alone. Only the output layer, which the roles don't share, takes its LoRA in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

from piflow import storage
from piflow.backbones import Backbone
from piflow.config import ModelConfig, find_family
from piflow.config.family import resolve
from piflow.config.model import ComputeDtype
from piflow.roles import lora
from piflow.storage.foreign import ForeignDataError, shown
from piflow.storage.model_folder import LIBRARY_ERRORS, reason
from piflow.storage.tensor_file import read_header

TEACHER = "teacher"  # the LoRA's name on the base
MAX_BYTES = 16 * 2**30
_PREFIX = "transformer."  # of the transformer's layers in diffusers' layout
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_DORA = ("dora_scale", "lora_magnitude_vector")


@dataclass(frozen=True)
class TeacherLora:
    """What is added to each layer's weight: B A.

    Attributes:
        where: the file's place, for messages.
        tensors: `<layer>.lora_A.weight` `(r, in)` and `<layer>.lora_B.weight` `(out, r)`, float32,
            on the CPU; B holds alpha / rank and the recipe's strength.
    """

    where: str
    tensors: Mapping[str, Tensor]

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank."""
        return lora.ranks_of(self.tensors)

    def without(self, outputs: Collection[str]) -> TeacherLora:
        """The same without the layers of these submodules."""
        kept = {name: tensor for name, tensor in self.tensors.items() if not _is_of(name, outputs)}
        return replace(self, tensors=kept)

    def check_fits(self, backbone: Backbone) -> None:
        """Refuses a LoRA that doesn't go onto the base, all of it.

        Raises:
            ValueError: layers that the base lacks or that aren't linear, or other shapes.
        """
        layers, ranks = dict(backbone.module.named_modules()), self.ranks
        sizes = {name: _sizes(layers.get(name)) for name in ranks}
        absent = [name for name, size in sizes.items() if size is None]
        if absent:
            raise ValueError(
                f"{self.where}: {len(absent)} of its {len(ranks)} layers are no linear layers of "
                f"this {backbone.class_name} (first {shown(absent[0])}): model.lora.path must be "
                "a LoRA for this base"
            )
        for name, size in sizes.items():
            a, b = (self.tensors[f"{name}{factor}"] for factor in _FACTORS)
            if (b.shape[0], a.shape[1]) != size:
                raise ValueError(
                    f"{self.where}: {shown(name)} is {size} (out, in) in the base, and the LoRA's "
                    f"product {(b.shape[0], a.shape[1])}: model.lora.path must be a LoRA for this "
                    "base"
                )


def read_teacher_lora(model: ModelConfig) -> TeacherLora | None:
    """The recipe's `model.lora`; None: it has none.

    Raises:
        ValueError: a file that isn't LoRA of the transformer alone, in a layout that the family's
            diffusers pipeline reads.
        OSError: it can't be read.
    """
    if model.lora is None:
        return None
    place, strength = model.lora.path, model.lora.strength
    tensors = read_lora(place, model.family, f"model.lora.path = {place}")
    scaled = {
        name: tensor.float() * (strength if name.endswith(_FACTORS[1]) else 1.0)
        for name, tensor in tensors.items()
    }
    return TeacherLora(place, scaled)


def read_lora(place: str, family: str, named: str | None = None) -> dict[str, Tensor]:
    """A LoRA file's tensors by the transformer's own names, with alpha = rank.

    Args:
        place: URI of a safetensors file.
        named: what a message calls a file that is none; default: the place.

    Raises:
        ValueError: as `read_teacher_lora`.
        OSError: it can't be read.
    """
    try:
        metadata = read_header(place).metadata  # before anything as long as it claims
        stored = parse_tensors(storage.read_bytes(place, max_bytes=MAX_BYTES))
    except (SafetensorError, ForeignDataError) as error:
        raise ValueError(
            f"{named or place} is no safetensors file: {shown(error, 1000)}"
        ) from error
    if dora := next((name for name in stored if any(part in name for part in _DORA)), None):
        raise ValueError(
            f"{place} holds DoRA ({shown(dora)}), which isn't LoRA: merge it into the base's "
            "weights, and give those as model.path"
        )
    layers = _in_diffusers_names(stored, family, place)
    kept = {key: metadata[key] for key in (lora.LORA_METADATA_KEY,) if key in metadata}
    return lora.with_scale_one(_of_transformer(layers, place), kept, place)


def check_teacher_lora(model: ModelConfig, empty: Callable[[], Backbone]) -> None:
    """Refuses a recipe's `model.lora` that doesn't go onto its base.

    Args:
        empty: makes the base; no values are needed.

    Raises:
        ValueError: as `read_teacher_lora` and `TeacherLora.check_fits`.
    """
    found = read_teacher_lora(model)
    if found is not None:
        found.check_fits(empty())


@torch.no_grad()
def merge(backbone: Backbone, teacher: TeacherLora, *, outputs_alone: bool = False) -> None:
    """Adds the LoRA to the base's weights, which must be there, each rounded to its dtype.

    Args:
        outputs_alone: only that of the output layer, whose weights are there in an empty base too.

    Raises:
        ValueError: it doesn't fit the base, or goes onto an output layer that the family keeps in
            another order.
    """
    teacher.check_fits(backbone)
    for layer in teacher.ranks:
        is_output = _is_of(layer, backbone.output_names)
        if outputs_alone and not is_output:
            continue
        a, b = (teacher.tensors[f"{layer}{factor}"] for factor in _FACTORS)
        if is_output:
            backbone.require_stored_output()
        weight = backbone.module.get_parameter(f"{layer}.weight")
        weight.copy_((weight.float().cpu() + b @ a).to(weight.device))


def put_on(backbone: Backbone, teacher: TeacherLora, compute_dtype: ComputeDtype = "base") -> None:
    """Adds the LoRA to the base's layers but the output layer's, frozen, under the name `TEACHER`.

    Call it after other adapters were added; their layers are found by plain names.

    Args:
        compute_dtype: as of the other adapters.
    """
    inner = teacher.without(backbone.output_names)
    ranks = inner.ranks
    if not ranks:
        return
    module = backbone.module
    lora.add_layers(module, TEACHER, ranks, dropout=0.0, compute_dtype=compute_dtype)
    for layer in ranks:
        for kind, factor in zip(("lora_A", "lora_B"), _FACTORS, strict=True):
            projection = module.get_submodule(f"{layer}.{kind}.{TEACHER}")
            made = projection.get_parameter("weight")
            device = "cpu" if made.is_meta else made.device
            value = inner.tensors[f"{layer}{factor}"].to(device, backbone.dtype)
            projection.register_parameter("weight", nn.Parameter(value, requires_grad=False))


def _in_diffusers_names(stored: dict[str, Tensor], family: str, where: str) -> dict[str, Tensor]:
    """Other trainers' layouts, brought to diffusers' by diffusers itself; alphas as tensors."""
    loader = find_family(family).lora_files
    if loader is None:
        return stored
    try:
        found: Any = resolve(loader).lora_state_dict(dict(stored), return_alphas=True)
    except LIBRARY_ERRORS as error:
        raise ValueError(
            f"{where} is LoRA in a layout that diffusers doesn't read for {family}: {reason(error)}"
        ) from error
    tensors, alphas = found if isinstance(found, tuple) else (found, None)
    return {**tensors, **(alphas or {})}


def _of_transformer(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """By the transformer's own names.

    Raises:
        ValueError: there is no LoRA, or something beside the transformer's.
    """
    tensors = {lora.published_name(name.removeprefix(_PREFIX)): t for name, t in named.items()}
    others = [name for name in tensors if not name.endswith((*_FACTORS, ".alpha"))]
    others += [name for name in tensors if name.startswith(("text_encoder", "unet."))]
    if others:
        raise ValueError(
            f"{where}: {shown(others[0])} isn't LoRA of a transformer's linear layer, and "
            f"{len(others)} of its {len(tensors)} tensors aren't: a teacher that is another in its "
            "text encoder, norms or biases must be given merged, as model.path"
        )
    if not tensors:
        raise ValueError(f"{where} holds no tensor of LoRA: check model.lora.path")
    return tensors


def _is_of(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _sizes(layer: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of a linear layer, adapted or not."""
    if isinstance(layer, LoraLayer):
        layer = layer.get_base_layer()
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None
