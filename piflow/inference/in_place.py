"""A student beside a pipeline's transformer: in its place while the pipeline samples, not else.

A LoRA student shares the transformer's weights. Its adapted layers and its output layer are
exchanged with the transformer's own for the length of a call, so that between calls the transformer
is the teacher, bit by bit: other pipelines may share it, and `save_pretrained` writes the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from piflow.backbones.base import pack, unpack
from piflow.backbones.transformer import TransformerBackbone
from piflow.inference.places import is_name
from piflow.inference.published import few_step_of
from piflow.inference.settings import (
    SETTINGS_KEY,
    settings_of,
    teacher_lora_of,
    with_lora_placed,
)
from piflow.policies import DXPolicy, GMFlowPolicy
from piflow.roles import lora
from piflow.roles.adapter import Adapter
from piflow.roles.heads import GMHead, PolicyHead
from piflow.roles.teacher_lora import TeacherLora
from piflow.roles.trio import Trio
from piflow.schedule import FewStep


@dataclass(frozen=True)
class Training:
    """What a student was trained for, as far as sampling needs it.

    Attributes:
        few_step: the schedule.
        embedded_guidance: FLUX.1-dev's guidance input; None if it isn't known or not there.
        files: what belongs to the adapter's folder beside its own two: its teacher's LoRA.
        frames: of its videos; None if it isn't known, or it makes pictures.
    """

    few_step: FewStep
    embedded_guidance: float | None
    files: tuple[str, ...] = ()
    frames: int | None = None

    @classmethod
    def of(cls, adapter: Adapter, where: str) -> Training:
        """What the exporter noted; else what the published adapters were trained for.

        Raises:
            ValueError: the notes are another version's.
        """
        if SETTINGS_KEY in adapter.metadata:
            settings = settings_of(adapter, where)
            lora = settings.model.lora
            files = (lora.path,) if lora is not None and is_name(lora.path) else ()
            frames = settings.model.frames
            return cls(settings.few_step, settings.embedded_guidance, files, frames)
        return cls(few_step_of(adapter, where), embedded_guidance=None)


class PipelineStudent:
    """The student that an adapter makes of a pipeline's transformer.

    Args:
        transformer: the pipeline's, usable as before once this returns.
        backbone: over the transformer, its parts, or a copy of it. A LoRA student shares its
            weights; a fully trained one has a copy of its own.
        adapter: what makes the student.
        where: the adapter's place, for messages.

    Attributes:
        head: reads policies from the tokens that `module` returns inside `in_place`.
        training: what the student was trained for.
        module: the student's transformer: the pipeline's with other parts, or one of its own.
        is_merged: whether the transformer is the student's own, from a merged student's folder.
        is_shared: whether its weights are the pipeline's, but for LoRA and head.

    Raises:
        ValueError: the transformer carries LoRA already, or the adapter doesn't fit it.
    """

    def __init__(
        self, transformer: nn.Module, backbone: TransformerBackbone, adapter: Adapter, where: str
    ) -> None:
        self.training = Training.of(adapter, where)
        self.is_merged: bool = adapter.body is not None
        _check_no_lora(dict(transformer.named_modules()))
        module = backbone.module
        own = dict(module.named_modules())
        shares = not set(transformer.modules()).isdisjoint(own.values())
        parts: dict[str, nn.Module] = {}
        try:
            trio = Trio.from_adapter(backbone, adapter, _teacher_lora(adapter, where, backbone))
        finally:
            if shares:
                parts = _student_parts(module, backbone.output_names)
                _exchange(module, {name: own[name] for name in parts})
                vars(module).pop("peft_config", None)
        self.head: PolicyHead = trio.head
        self.module: nn.Module = trio.backbone.module
        self.is_shared = shares and self.module is module
        self._parts = parts if self.is_shared else {}

    @property
    def is_elastic(self) -> bool:
        """Whether it runs at more evaluations than it was trained for."""
        return isinstance(self.head, GMHead)

    @torch.no_grad()
    def to(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Moves the student's own weights; the policy head stays in float32, as it was trained."""
        self.head.to(device, torch.float32)
        head = {id(tensor) for tensor in self.head.parameters()}
        for tensor in self._own_tensors():
            if id(tensor) not in head:
                tensor.data = tensor.to(device, dtype)

    def _own_tensors(self) -> Iterator[Tensor]:
        """LoRA on the pipeline's transformer, or all of a transformer of its own."""
        if self.is_shared:
            for layer in lora.layers(nn.ModuleList(self._parts.values())):
                yield from (*layer.lora_A.parameters(), *layer.lora_B.parameters())
        else:
            yield from (*self.module.parameters(), *self.module.buffers())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, `module` is the student's and returns raw tokens.

        Raises:
            ValueError: the transformer's owner put LoRA onto layers that the student adapts.
        """
        teacher = {name: self.module.get_submodule(name) for name in self._parts}
        _check_no_lora(teacher)
        _exchange(self.module, self._parts)
        try:
            yield
        finally:
            _exchange(self.module, teacher)


@dataclass(frozen=True)
class PackedTokens:
    """Samples are packed, as in FLUX and Qwen-Image: (B, HW/p², p²C), channel-major.

    Attributes:
        head: the student's.
        height, width: of the latents.
    """

    head: PolicyHead
    height: int
    width: int

    @classmethod
    def of_picture(
        cls, head: PolicyHead, height: int, width: int, vae_scale_factor: int
    ) -> PackedTokens:
        """For a picture's pixels, rounded down to whole patches as the families do."""
        side = head.patch_size
        patch = side * vae_scale_factor
        return cls(head, side * (height // patch), side * (width // patch))

    def latents(self, sample: Tensor) -> Tensor:
        """(B, HW/p², p²C) -> (B, C, H, W)."""
        return unpack(sample, self.height, self.width, self.head.patch_size)

    def sample(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, HW/p², p²C)."""
        return pack(latents, self.head.patch_size)

    def policy(self, tokens: Tensor, latents: Tensor, sigma: Tensor) -> GMFlowPolicy | DXPolicy:
        """From the student's tokens at (latents, sigma (B,))."""
        return _policy(self.head, tokens, latents, sigma)


@dataclass(frozen=True)
class PlainLatents:
    """Samples are latents (B, C, H, W) already, as in DiT.

    Attributes:
        head: the student's.
    """

    head: PolicyHead

    def latents(self, sample: Tensor) -> Tensor:
        return sample

    def sample(self, latents: Tensor) -> Tensor:
        return latents

    def policy(self, tokens: Tensor, latents: Tensor, sigma: Tensor) -> GMFlowPolicy | DXPolicy:
        """From the student's tokens at (latents, sigma (B,))."""
        return _policy(self.head, tokens, latents, sigma)


@dataclass(frozen=True)
class FramesApart:
    """Samples are latents of videos, (B, C, F, h, w), as in Wan; the student's are (B, C, F·h, w).

    Attributes:
        head: the student's.
        frames: F.
    """

    head: PolicyHead
    frames: int

    def latents(self, sample: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, C, F·h, w)."""
        return sample.flatten(2, 3)

    def sample(self, latents: Tensor) -> Tensor:
        """(B, C, F·h, w) -> (B, C, F, h, w)."""
        return latents.unflatten(2, (self.frames, -1))

    def policy(self, tokens: Tensor, latents: Tensor, sigma: Tensor) -> GMFlowPolicy | DXPolicy:
        """From the student's tokens at (latents, sigma (B,))."""
        return _policy(self.head, tokens, latents, sigma)


def _policy(
    head: PolicyHead, tokens: Tensor, latents: Tensor, sigma: Tensor
) -> GMFlowPolicy | DXPolicy:
    def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
        return unpack(tokens, height, width, head.patch_size)

    return head.policy(tokens, unpacked, latents, sigma)


def _teacher_lora(
    adapter: Adapter, where: str, backbone: TransformerBackbone
) -> TeacherLora | None:
    """What the student has of its teacher's LoRA, which isn't the output layer's nor all weights'.

    Raises:
        ValueError: the adapter names a place that it may not name, or another LoRA lies there.
    """
    if adapter.is_full_model or SETTINGS_KEY not in adapter.metadata:
        return None
    found = teacher_lora_of(adapter, with_lora_placed(settings_of(adapter, where), where))
    return None if found is None else found.without(backbone.output_names)


def _check_no_lora(layers: Mapping[str, nn.Module]) -> None:
    """Refuses layers that other LoRA is on."""
    for name, layer in layers.items():
        if isinstance(layer, BaseTunerLayer):
            raise ValueError(
                f"the pipeline's transformer carries LoRA on {name}, where the student needs the "
                "layer itself: call unload_lora_weights(), after fuse_lora() if it is to stay"
            )


def _student_parts(module: nn.Module, output_names: Sequence[str]) -> dict[str, nn.Module]:
    """The module's LoRA layers and output layer, by name."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    return {name: module.get_submodule(name) for name in (*names, *output_names)}


def _exchange(module: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Puts each part in the place that its name says."""
    for name, part in parts.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, part)
