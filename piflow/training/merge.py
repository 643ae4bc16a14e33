"""A checkpoint's student as one model: base, the teacher's LoRA, the student's, and its head.

    base's file ──┐
    LoRA's B A  ──┼── one tensor ──▶ its place in a shard ──▶ the shard's file
    checkpoint  ──┘

Memory holds a shard and one tensor at a time, never a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from piflow import storage
from piflow.backbones import load_empty_backbone
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import Recipe
from piflow.roles.adapter import HEAD_LAYERS, AdapterConfig
from piflow.roles.heads import PolicyClock
from piflow.roles.lora import ranks_of
from piflow.roles.merged import head_as_stored
from piflow.roles.teacher_lora import TeacherLora, read_teacher_lora
from piflow.schedule import FewStep
from piflow.sharding.weights import StoredTensor, read_tensor, stored_tensors
from piflow.training.checkpoint import StoredSection


@dataclass(frozen=True)
class MergedStudent:
    """What a merged student's files hold, tensor by tensor.

    Attributes:
        backbone: the base's, less its values.
        config: the student's, as an adapter has it.
        stored: the base's tensors by their names in its files, less its output layer's.
        layers: the backbone's own name of each of them that is a parameter.
        trained: the checkpoint's tensors.
        teacher_lora: merged into the base; None: there is none, or the checkpoint has it already.
    """

    backbone: TransformerBackbone
    config: AdapterConfig
    stored: Mapping[str, StoredTensor]
    layers: Mapping[str, str]
    trained: StoredSection
    teacher_lora: TeacherLora | None

    @classmethod
    def of(cls, recipe: Recipe, trained: StoredSection) -> MergedStudent:
        """The student that the checkpoint holds, on the recipe's base.

        Raises:
            ValueError: a family whose students aren't merged, a base that isn't the family's model,
                or a checkpoint or teacher's LoRA that doesn't fit it.
        """
        backbone, sources = load_empty_backbone(
            recipe.model, embedded_guidance=recipe.guidance.embedded
        )
        if not isinstance(backbone, TransformerBackbone):
            raise ValueError(
                f"students of the family {recipe.model.family} aren't merged: export an adapter"
            )
        outputs = backbone.stored_output_names
        found = stored_tensors(storage.for_ranges(recipe.model.path))
        stored = {name: s for name, s in found.items() if name.split(".")[0] not in outputs}
        names = {(source.uri, source.offset): name for name, source in stored.items()}
        layers = {}
        for layer, parameter in backbone.module.named_parameters():
            source = sources.get(parameter)
            if source is not None and (source.uri, source.offset) in names:
                layers[names[source.uri, source.offset]] = layer
        is_lora = any(".lora_" in name for name in trained.empty)
        teacher_lora = read_teacher_lora(recipe.model) if is_lora else None
        if teacher_lora is not None:
            teacher_lora.check_fits(backbone)
        clock = PolicyClock.of(FewStep.of(recipe.distillation()))
        config = AdapterConfig.of(backbone, recipe.policy, clock)
        made = cls(backbone, config, stored, layers, trained, teacher_lora)
        made._require_whole()
        return made

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """The head's tensors as they are stored."""
        names = [name for name in self.trained.empty if self._is_of_head(name)]
        tensors = self.trained.read(names)
        return head_as_stored(self.backbone, tensors, self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        body = {name: source.shape for name, source in self.stored.items()}
        return {**body, **{name: tuple(tensor.shape) for name, tensor in self.head.items()}}

    @cached_property
    def linear(self) -> frozenset[str]:
        """Names of the weights of linear layers inside the transformer's blocks."""
        found = {
            f"{name}.{inner}.weight"
            for name, block in self.backbone.module.named_modules()
            if isinstance(block, self.backbone.block_classes)
            for inner, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }
        return frozenset(name for name, layer in self.layers.items() if layer in found)

    def keeps_float32(self, name: str) -> bool:
        """Whether diffusers loads this tensor in float32 whatever dtype is asked for."""
        layer = self.layers.get(name)
        if layer is None:
            return False
        return self.backbone.module.get_parameter(layer).dtype != self.backbone.dtype

    def read(self, name: str) -> Tensor:
        """A tensor's value, float32: the base's in the dtype that it was trained in, and LoRA."""
        if name in self.head:
            return self.head[name].float()
        layer = self.layers.get(name)
        if layer is not None and layer in self.trained.empty:  # all weights were trained
            return self.trained.read([layer])[layer].float()
        dtype = self.backbone.dtype
        if layer is not None:
            dtype = self.backbone.module.get_parameter(layer).dtype
        value = read_tensor(self.stored[name]).to(dtype).float()
        return value if layer is None else self._with_lora(value, layer)

    def _with_lora(self, value: Tensor, layer: str) -> Tensor:
        names = [f"{layer.removesuffix('.weight')}.lora_{factor}.weight" for factor in "AB"]
        if names[0] in self.trained.empty:
            factors = self.trained.read(names)
            value.addmm_(factors[names[1]].float(), factors[names[0]].float())
        if self.teacher_lora is not None and names[0] in self.teacher_lora.tensors:
            a, b = (self.teacher_lora.tensors[name] for name in names)
            value.addmm_(b, a)
        return value

    def _is_of_head(self, name: str) -> bool:
        parts = ("norm_out", *HEAD_LAYERS[self.config.policy().type])
        return name.startswith(tuple(f"{part}." for part in parts))

    def _require_whole(self) -> None:
        """Refuses a student of whose trained tensors one would be left out."""
        taken = set(self.layers.values())
        left = [
            name
            for name in self.trained.empty
            if ".lora_" not in name and not self._is_of_head(name) and name not in taken
        ]
        ranks = ranks_of(self.trained.empty) | (
            {} if self.teacher_lora is None else self.teacher_lora.ranks
        )
        left += [
            f"{layer}.lora_A.weight"
            for layer in ranks
            if f"{layer}.weight" not in taken and not layer.startswith(self.backbone.output_names)
        ]
        if left:
            raise ValueError(
                f"{len(left)} trained tensors have no place in the base's files, first {left[0]}: "
                "export an adapter"
            )


def as_fp8(value: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in float8_e4m3fn, and the float32 scale that gives it back: w = fp8 · scale.

    One scale a tensor, which maps the largest magnitude to the largest number that fp8 has.
    """
    largest = value.abs().max()
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = (largest / limit).clamp_min(torch.finfo(torch.float32).tiny)
    if not scale.isfinite():
        raise ValueError("a weight isn't finite: check that training stayed finite")
    return (value / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale
