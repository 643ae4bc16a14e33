"""From a recipe to a trainer and a way to draw: everything of a run but data, files and cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from piflow.backbones import Conditioning, PixelCodec, build_codec
from piflow.batch import conditioning
from piflow.config import FlowMatchingConfig, PiIDConfig, Recipe
from piflow.data.store import EmbeddingStore
from piflow.objective import FlowMatchingObjective, PiIDObjective
from piflow.pictures import grid
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FlowSchedule, segments
from piflow.sharding.base import Strategy
from piflow.step import Trainer
from piflow.teacher import average_of, fresh_backbone
from piflow.trio import GuidedTeacher, Trio

SAMPLE_PROMPTS = 4
SAMPLE_SEEDS = 4
_PRETRAIN_STEPS = 16  # Euler steps of the pictures drawn during pre-training


@dataclass(frozen=True)
class Assembly:
    """A trainer, and the EMA as a function (conditioning, noise latents) -> x0 latents."""

    trainer: Trainer
    draw: Callable[[Conditioning, Tensor], Tensor]
    draw_samples: Callable[[], Image.Image]


def assemble(recipe: Recipe, strategy: Strategy, device: torch.device) -> Assembly:
    """Load and shard the models, and build the trainer for the recipe's objective.

    Raises:
        ValueError: model, store and recipe don't fit one another.
    """
    store = EmbeddingStore.open(recipe.embed.store)
    codec = build_codec(recipe.model)
    empty = conditioning(store.empty_prompt(), device)
    if isinstance(recipe.objective, PiIDConfig):
        trainer, draw = _distillation(recipe, recipe.objective, codec, empty, strategy, device)
    else:
        trainer, draw = _pretraining(recipe, recipe.objective, codec, empty, strategy, device)
    return Assembly(trainer, draw, lambda: _draw_samples(recipe, store, codec, draw, device))


def _distillation(
    recipe: Recipe,
    objective: PiIDConfig,
    codec: PixelCodec,
    empty: Conditioning,
    strategy: Strategy,
    device: torch.device,
) -> tuple[Trainer, Callable[[Conditioning, Tensor], Tensor]]:
    trio = Trio.build(
        recipe.model,
        recipe.lora,
        recipe.policy,
        generator=torch.Generator().manual_seed(recipe.seed),
        embedded_guidance=recipe.guidance.embedded,
    )
    if recipe.training.gradient_checkpointing:
        trio.backbone.enable_gradient_checkpointing()
    strategy.prepare(trio.module, trio.block_classes)
    trainer = Trainer(
        PiIDObjective(trio, codec, empty, recipe, device),
        trio.trainable_parameters(),
        trio.ema_parameters(),
        strategy,
        recipe.training,
        recipe.seed,
    )
    schedule = FlowSchedule(objective.shift)
    steps = segments(objective.nfe, objective.final_step_size_scale)

    def draw(cond: Conditioning, noise: Tensor) -> Tensor:
        return sample_few_step(
            lambda x, sigma: trio.ema(x, sigma, cond),
            noise,
            schedule,
            steps,
            total_substeps=objective.total_substeps,
        )

    return trainer, draw


def _pretraining(
    recipe: Recipe,
    objective: FlowMatchingConfig,
    codec: PixelCodec,
    empty: Conditioning,
    strategy: Strategy,
    device: torch.device,
) -> tuple[Trainer, Callable[[Conditioning, Tensor], Tensor]]:
    from piflow.demo.emoji import PictureSource

    backbone = fresh_backbone(recipe.model, recipe.seed)
    average = average_of(backbone)
    for view in (backbone, average):
        strategy.prepare(view.module, view.block_classes)
    trainer = Trainer(
        FlowMatchingObjective(
            backbone, codec, PictureSource(recipe.embed.height), empty, objective, device
        ),
        dict(backbone.module.named_parameters()),
        dict(average.module.named_parameters()),
        strategy,
        recipe.training,
        recipe.seed,
    )
    schedule = FlowSchedule(objective.shift)

    def draw(cond: Conditioning, noise: Tensor) -> Tensor:
        teacher = GuidedTeacher(average, cond, empty, recipe.guidance)
        return sample_euler(teacher, noise, schedule, _PRETRAIN_STEPS)

    return trainer, draw


@torch.no_grad()
def _draw_samples(
    recipe: Recipe,
    store: EmbeddingStore,
    codec: PixelCodec,
    draw: Callable[[Conditioning, Tensor], Tensor],
    device: torch.device,
) -> Image.Image:
    """A small grid, a row a prompt; the same prompts and noise all along a run."""
    batch = store.first_by_hash(min(SAMPLE_PROMPTS, store.manifest.num_rows))
    cond = conditioning(batch, device)
    shape = codec.latent_shape(recipe.embed.height, recipe.embed.width)
    columns = []
    for seed in range(SAMPLE_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((len(batch.prompts), *shape), generator=generator).to(device)
        columns.append(codec.decode(draw(cond, noise)).cpu())
    rows = list(torch.stack(columns, dim=1))
    return grid(rows, batch.prompts, [f"seed {seed}" for seed in range(SAMPLE_SEEDS)])
