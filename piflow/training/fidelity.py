"""How close a student in another format is to its adapter, by the velocities of both.

Neither is held in memory: a block's weights are read from their files when it computes, and let go
of after it. So a model of any size is measured beside a block of it, in four passes over the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from piflow import storage
from piflow.backbones import (
    DTYPES,
    Backbone,
    Conditioning,
    build_codec,
    load_backbone,
    load_empty_backbone,
)
from piflow.backbones.load import with_frames
from piflow.config import Recipe, find_family
from piflow.data.batch import by_condition, conditioning
from piflow.data.layout import recipe_prompts
from piflow.data.reader import EmbeddingStore
from piflow.flow import draw_noise
from piflow.inference.settings import SamplingSettings, encode_prompts
from piflow.roles.adapter import Adapter
from piflow.roles.merged import TRANSFORMER, empty_student, read_student
from piflow.roles.teacher_lora import read_teacher_lora
from piflow.roles.trio import Trio
from piflow.schedule import FewStep
from piflow.sharding.weights import StoredTensor, fill, missing
from piflow.training.merge import MergedStudent

PROMPTS = 2
SIDE = 256  # pixels of a picture's sides at most, where the model takes smaller ones
SEED = 0  # of the noise

Velocities = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, C, h, w), sigma (B,), B prompts) -> a student's velocity at its policies' starts."""


@dataclass(frozen=True)
class Fidelity:
    """What was measured.

    Attributes:
        error: RMS of the difference of velocities over the RMS of the adapter's.
        velocities: how many, of `PROMPTS` prompts at the noise level of each step.
        height, width: pixels.
    """

    error: float
    velocities: int
    height: int
    width: int

    def __str__(self) -> str:
        return (
            f"relative velocity RMS error against the bfloat16 adapter: {self.error:.2e} "
            f"({self.velocities} velocities at {self.height}x{self.width} pixels)"
        )


@torch.no_grad()
def measure(recipe: Recipe, student: MergedStudent, folder: str, device: torch.device) -> Fidelity:
    """An exported student's velocities against those of the same checkpoint's bfloat16 adapter.

    Args:
        recipe: with the base at the run's commit.
        student: what was exported.
        folder: URI of what it was exported to.

    Raises:
        ValueError, OSError: prompts are neither in the recipe's store nor can be embedded.
    """
    size = _size(recipe, student)
    shape = build_codec(recipe.model).latent_shape(*size)
    cond = _prompts(recipe).to(device)
    generator = torch.Generator().manual_seed(SEED)
    noise = draw_noise((cond.batch_size, *shape), generator).to(device)
    few_step = FewStep.of(recipe.distillation())
    levels = [few_step.schedule.sigma(segment.tau_src) for segment in few_step.segments]

    def at(level: float, x0: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.full((len(noise),), level, device=device)
        return level * noise + (1 - level) * x0, sigma

    with _adapter(recipe, student, device) as velocities:
        first = velocities(*at(1.0, noise), cond)
        points = [at(level, noise - first) for level in levels]
        x, sigma = (torch.cat(parts) for parts in zip(*points, strict=True))
        repeated = Conditioning.cat([cond] * len(levels))
        expected = velocities(x, sigma, repeated)
    with _whole(recipe, folder, device) as velocities:
        found = velocities(x, sigma, repeated)
    difference = (found - expected).double().square().mean().sqrt()
    error = difference / expected.double().square().mean().sqrt()
    return Fidelity(float(error), len(x), *size)


def _size(recipe: Recipe, student: MergedStudent) -> tuple[int, int]:
    """Height and width in pixels."""
    whole = (recipe.embed.height, recipe.embed.width)
    if student.backbone.fixed_size or max(whole) <= SIDE:
        return whole
    return SIDE, SIDE


def _prompts(recipe: Recipe) -> Conditioning:
    """The first prompts of the recipe's store; without one, of its prompts, by its encoder."""
    if recipe.embed.mode == "store" and storage.exists(recipe.embed.store):
        store = EmbeddingStore.open(recipe.embed.store, recipe.training.damaged_rows)
        batch = store.read(range(min(PROMPTS, store.manifest.num_rows)))
        cond = conditioning(by_condition(batch)[0][1], torch.device("cpu"))
    elif recipe.condition_sizes is not None:
        raise ValueError(
            f"the students' quality is measured on pictures to be edited of the recipe's store, "
            f"{recipe.embed.store}, and there is none; run `piflow embed` with this recipe"
        )
    else:
        texts = [prompt.text for prompt in recipe_prompts(recipe).prompts[:PROMPTS]]
        settings = SamplingSettings.of(recipe).model_copy(update={"encoder": recipe.encoder})
        cond = encode_prompts(settings, texts)
    return cond.cut() if find_family(recipe.model.family).masks_text else cond


@contextmanager
def _adapter(recipe: Recipe, student: MergedStudent, device: torch.device) -> Iterator[Velocities]:
    """The bfloat16 adapter on its base."""
    tensors = {
        name: tensor.bfloat16()
        for name, tensor in student.trained.read(student.trained.empty).items()
    }
    adapter = Adapter(student.config, tensors, {})
    guidance = recipe.guidance.embedded
    if adapter.is_full_model:  # copied as a whole, as it was trained
        trio = Trio.from_adapter(load_backbone(recipe.model, embedded_guidance=guidance), adapter)
        for module in trio.modules[1:]:
            module.to(device)
        yield _velocities(trio)
        return
    backbone, sources = load_empty_backbone(recipe.model, embedded_guidance=guidance)
    trio = Trio.from_adapter(backbone, adapter, read_teacher_lora(recipe.model))
    with streamed(trio.backbone, sources, device):
        yield _velocities(trio)


@contextmanager
def _whole(recipe: Recipe, folder: str, device: torch.device) -> Iterator[Velocities]:
    """A merged student of any format."""
    adapter = read_student(storage.join(folder, TRANSFORMER))
    model = recipe.model
    backbone, sources = empty_student(
        adapter, model.family, DTYPES[model.dtype], recipe.guidance.embedded
    )
    trio = Trio.from_adapter(with_frames(backbone, model), adapter)
    with streamed(trio.backbone, sources, device):
        yield _velocities(trio)


def _velocities(trio: Trio) -> Velocities:
    def velocities(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return trio.student(x, sigma, cond).velocity(x, sigma)

    return velocities


@contextmanager
def streamed(
    backbone: Backbone, sources: Mapping[nn.Parameter, StoredTensor], device: torch.device
) -> Iterator[None]:
    """Inside, the empty model computes: each block has its weights while it does, and only then.

    What is outside of blocks has them throughout. Afterwards the model is of no use.

    Args:
        backbone: its parameters without values are on "meta".
        sources: where these lie, as `load_empty` gives them.
    """
    module = backbone.module
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    stored = missing(module, sources)
    handles = []
    for name, block in module.named_modules():
        if not isinstance(block, backbone.block_classes):
            continue
        prefix = f"{name}."
        own = {key.removeprefix(prefix): s for key, s in stored.items() if key.startswith(prefix)}
        stored = {key: s for key, s in stored.items() if not key.startswith(prefix)}
        handles += _while_it_computes(block, own, device)
    fill(module, stored, device=device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _while_it_computes(
    block: nn.Module, own: Mapping[str, StoredTensor], device: torch.device
) -> list[torch.utils.hooks.RemovableHandle]:
    empty = {name: block.get_parameter(name).detach() for name in own}

    def read(*_: object) -> None:
        fill(block, own, device=device)

    def let_go(*_: object) -> None:
        block.load_state_dict(empty, strict=False, assign=True)

    return [block.register_forward_pre_hook(read), block.register_forward_hook(let_go)]
