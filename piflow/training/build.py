"""From a recipe to a trainer and a way to draw: everything of a run but data, files and cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from piflow.backbones import (
    Backbone,
    Codec,
    Conditioning,
    build_codec,
    load_backbone,
    load_empty_backbone,
)
from piflow.backbones.flops import sample_flops
from piflow.backbones.flux.fresh import average_of, fresh_backbone
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import FlowMatchingConfig, PiIDConfig, Recipe
from piflow.config.model import BaseWeights
from piflow.data.batch import (
    MicroBatch,
    StreamBatch,
    by_condition,
    conditioning,
    cut_for,
    on_device,
)
from piflow.data.online import SAMPLE_PROMPTS
from piflow.data.reader import PromptStore
from piflow.flow import draw_noise
from piflow.inference.pixels import strip
from piflow.planning.model import coded_layers
from piflow.roles.adapter import Adapter
from piflow.roles.base_weights import Coded
from piflow.roles.fp8 import Fp8Linears, check_device
from piflow.roles.guided import GuidedTeacher
from piflow.roles.heads import PolicyClock
from piflow.roles.teacher_lora import read_teacher_lora
from piflow.roles.trio import Trio
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FewStep, FlowSchedule
from piflow.sharding import FSDPStrategy
from piflow.sharding.base import Strategy
from piflow.sharding.side_stream import SideStream
from piflow.sharding.weights import StoredTensor, fill, missing
from piflow.training.attention import use_attention
from piflow.training.blocks import prepare_blocks
from piflow.training.context_parallel import split_tokens
from piflow.training.objective import (
    CleanLatents,
    FlowMatchingObjective,
    PiIDObjective,
    drawn_latents,
    stored_latents,
    training_flops,
)
from piflow.training.placement import keeps_fp8_weights
from piflow.training.step import Trainer
from piflow.training.warm_start import check_start, read_start

SAMPLE_SEEDS = 4

_PRETRAIN_STEPS = 16  # Euler steps of the pictures drawn during pre-training


@dataclass(frozen=True)
class Samples:
    """Pictures of a few prompts.

    Attributes:
        prompts: P of them.
        pictures: (P, `SAMPLE_SEEDS`, 3, H, W) in [-1, 1], on the CPU.
    """

    prompts: tuple[str, ...]
    pictures: Tensor


@dataclass(frozen=True)
class Assembly:
    """A trainer and what is drawn and measured beside its steps.

    Attributes:
        draw: the EMA as a function (conditioning, noise latents) -> x0 latents.
        draw_samples: pictures by the EMA, of the same prompts and noise all along a run.
        flops: operations of training on one sample of a micro-batch's sizes.
        attention: the kernel of the models' attention and why.
        bring: starts to copy a step's batch to the device, beside the step that computes.
        teacher_error: `PiIDObjective.teacher_error`, if the teacher computes in fp8.
        coded: what a base in codes became.
    """

    trainer: Trainer
    draw: Callable[[Conditioning, Tensor], Tensor]
    draw_samples: Callable[[], Samples]
    flops: Callable[[MicroBatch], int]
    attention: str
    bring: Callable[[StreamBatch], StreamBatch]
    teacher_error: Callable[[MicroBatch, int], float] | None = None
    coded: Coded | None = None


_Parts = tuple[Trainer, Callable[[Conditioning, Tensor], Tensor], tuple[nn.Module, ...], Backbone]
"""Trainer, `Assembly.draw`, all that is called, and the student's backbone."""


def assemble(
    recipe: Recipe, store: PromptStore, strategy: Strategy, device: torch.device
) -> Assembly:
    """Load and shard the models, and build the trainer for the recipe's objective.

    Args:
        store: the recipe's, opened: for samples, guidance and the empty prompt.

    Raises:
        ValueError: model, store and recipe don't fit one another.
    """
    allow_tf32(device)
    codec = build_codec(recipe.model)
    if isinstance(recipe.objective, PiIDConfig):
        parts = _distillation(recipe, recipe.objective, codec, store, strategy, device)
    else:
        parts = _pretraining(recipe, recipe.objective, codec, store, strategy, device)
    trainer, draw, modules, backbone = parts
    attention = use_attention(recipe, modules, device)

    def flops(batch: MicroBatch) -> int:
        _, height, width = codec.latent_shape(batch.height, batch.width)
        cond = conditioning(batch, torch.device("cpu"), shared_by=cut_for(recipe))
        return training_flops(sample_flops(backbone, height, width, cond), recipe)

    objective = trainer.objective
    teacher_error = None
    coded = objective.trio.coded if isinstance(objective, PiIDObjective) else None
    if recipe.model.fp8_teacher is not None and isinstance(objective, PiIDObjective):
        teacher_error = objective.teacher_error
    draw_samples = partial(_draw_samples, recipe, store, codec, draw, device)
    shared_by = cut_for(recipe) if isinstance(recipe.objective, PiIDConfig) else None
    bring = partial(on_device, stream=SideStream(device), shared_by=shared_by)
    return Assembly(trainer, draw, draw_samples, flops, attention, bring, teacher_error, coded)


def allow_tf32(device: torch.device) -> None:
    """On a GPU, float32 matrix products of this process may run in TF32, about 8 times faster.

    What is kept in float32 there (heads, students of a full training, a float32 base) is read by
    tensor cores with 10 bits of mantissa, three more than bfloat16 has, and summed in float32. A
    policy has one such product, a sum over all pixels in its spread's gradient, where roundings
    average out; schedules and losses have none. A CPU keeps float32.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def _distillation(
    recipe: Recipe,
    objective: PiIDConfig,
    codec: Codec,
    store: PromptStore,
    strategy: Strategy,
    device: torch.device,
) -> _Parts:
    dependent = objective.data == "dependent"
    clean = _clean_latents(recipe, store, codec, device) if dependent else None
    negative = conditioning(
        store.negative_prompt(recipe.guidance.negative_prompt), device, shared_by=cut_for(recipe)
    )
    trio = prepared_trio(recipe, strategy, start=read_start(recipe))
    trainer = Trainer(
        PiIDObjective(trio, codec, negative, recipe, device, clean),
        trio.trainable_parameters(),
        trio.ema_parameters(),
        strategy,
        recipe.training,
        recipe.seed,
        context_parallel=recipe.runtime.context_parallel,
    )
    few_step = FewStep.of(objective)

    def draw(cond: Conditioning, noise: Tensor) -> Tensor:
        return sample_few_step(lambda x, sigma: trio.ema(x, sigma, cond), noise, few_step)

    return trainer, draw, trio.modules, trio.backbone


def prepared_trio(recipe: Recipe, strategy: Strategy, *, start: Adapter | None = None) -> Trio:
    """The recipe's trio, spread over the workers.

    A base that is frozen and sharded is never whole anywhere: each worker reads what it keeps, once
    the empty module is sharded. A worker's host memory then peaks at its shards, the unsharded
    adapters and heads, and a buffer (under DeepSpeed also one tensor). Full training copies the
    base and replicas keep all of it, so there every worker loads it whole; or, where the recipe
    has it in codes, layer by layer.

    Args:
        start: what student and EMA begin as, in place of the teacher.

    Raises:
        ValueError: as `build_trio`; or `start` doesn't fit.
    """
    stored: dict[str, StoredTensor] = {}
    if recipe.model.base_weights is not None:
        trio = _coded_trio(recipe, recipe.model.base_weights, start, strategy.device)
    elif recipe.lora is not None and strategy.splits_frozen:
        trio, stored = build_empty_trio(recipe, start=start)
    else:
        trio = build_trio(recipe, start=start)
    fp8 = _fp8_teacher(recipe, trio, strategy)
    prepare_blocks(recipe.runtime, trio.backbone, trio.modules)
    split_tokens(trio.backbone, trio.modules, recipe.runtime.context_parallel, strategy.device)
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    if stored:
        # where the trained weights are: the host, if the strategy offloads
        device = next(iter(trio.trainable_parameters().values())).device
        fill(trio.backbone.module, stored, device=device, part=strategy.part)
    if fp8 is not None and fp8.apart and isinstance(strategy, FSDPStrategy):
        fp8.find_shards(strategy.sharers, strategy.device)
    return trio


def _coded_trio(
    recipe: Recipe, kind: BaseWeights, start: Adapter | None, device: torch.device
) -> Trio:
    """A replica whose base was never whole: each weight is read, put into codes and forgotten."""
    trio, stored = build_empty_trio(recipe, start=start)
    trio.code_base(kind, stored=stored, device=device)
    module = trio.backbone.module
    left = {name for name, _ in module.named_parameters()} & stored.keys()
    fill(module, {name: stored[name] for name in sorted(left)}, device=device)
    return trio


def _fp8_teacher(recipe: Recipe, trio: Trio, strategy: Strategy) -> Fp8Linears | None:
    """Has the teacher compute in fp8, if the recipe says so; before sharding."""
    if recipe.model.fp8_teacher is None:
        return None
    check_device(strategy.device)
    keep = keeps_fp8_weights(recipe, strategy)
    linears = trio.use_fp8_teacher(keep=keep)
    if keep and isinstance(strategy, FSDPStrategy):
        backbone = trio.backbone
        if not isinstance(backbone, TransformerBackbone):
            raise ValueError(
                "model.fp8_teacher.keep_weights: which layers are applied to tokens isn't known of "
                f"model.family = {recipe.model.family}; set it to false"
            )
        linears.keep_shards(coded_layers(recipe, backbone))
    return linears


def _pretraining(
    recipe: Recipe,
    objective: FlowMatchingConfig,
    codec: Codec,
    store: PromptStore,
    strategy: Strategy,
    device: torch.device,
) -> _Parts:
    clean = _clean_latents(recipe, store, codec, device)
    empty = conditioning(store.empty_prompt(), device)
    negative = conditioning(store.negative_prompt(recipe.guidance.negative_prompt), device)
    backbone = fresh_backbone(recipe.model, recipe.seed)
    average = average_of(backbone)
    modules = (backbone.module, average.module)
    prepare_blocks(recipe.runtime, backbone, modules)
    split_tokens(backbone, modules, recipe.runtime.context_parallel, device)
    for view in (backbone, average):
        strategy.prepare(view.module, view.block_classes)
    trainer = Trainer(
        FlowMatchingObjective(backbone, clean, empty, objective, device),
        dict(backbone.module.named_parameters()),
        dict(average.module.named_parameters()),
        strategy,
        recipe.training,
        recipe.seed,
        context_parallel=recipe.runtime.context_parallel,
    )
    schedule = FlowSchedule(objective.shift)

    def draw(cond: Conditioning, noise: Tensor) -> Tensor:
        teacher = GuidedTeacher(average, cond, negative, recipe.guidance)
        return sample_euler(teacher, noise, schedule, _PRETRAIN_STEPS)

    return trainer, draw, modules, backbone


def _clean_latents(
    recipe: Recipe, store: PromptStore, codec: Codec, device: torch.device
) -> CleanLatents:
    """Latents of the prompts' pictures: those in the store, or of emoji drawn on the fly."""
    if recipe.objective.pictures == "store":
        store.require_latents()
        return stored_latents
    from piflow.demo.emoji import PictureSource

    source = PictureSource(recipe.embed.height)
    source.require(store.index()["prompt"].to_pylist())
    return drawn_latents(codec, source, device)


@torch.no_grad()
def _draw_samples(
    recipe: Recipe,
    store: PromptStore,
    codec: Codec,
    draw: Callable[[Conditioning, Tensor], Tensor],
    device: torch.device,
) -> Samples:
    batch = store.first_by_hash(min(SAMPLE_PROMPTS, store.layout.num_rows))
    groups = [
        (rows, conditioning(part, device, shared_by=cut_for(recipe)))
        for rows, part in by_condition(batch)
    ]
    shape = codec.latent_shape(recipe.embed.height, recipe.embed.width)
    columns = []
    for seed in range(SAMPLE_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        noise = draw_noise((len(batch.prompts), *shape), generator, device)
        drawn: dict[int, Tensor] = {}
        for rows, cond in groups:
            pictures = strip(codec.decode(draw(cond, noise[rows])), codec.frames).cpu()
            drawn.update(zip(rows, pictures, strict=True))
        columns.append(torch.stack([drawn[row] for row in range(len(batch.prompts))]))
    return Samples(tuple(batch.prompts), torch.stack(columns, dim=1))


def build_trio(
    recipe: Recipe, *, device: torch.device | str = "cpu", start: Adapter | None = None
) -> Trio:
    """Loads the recipe's base and adds student and EMA to it, in training mode.

    Args:
        device: where the base is loaded, whole; see `build_empty_trio` for one that only fits
            sharded.
        start: what student and EMA begin as, in place of the teacher.

    Raises:
        ValueError: the recipe distils nothing, a folder that isn't the family's model, a LoRA
            target without a match, or a `start` that doesn't fit.
    """
    objective = recipe.distillation()
    backbone = load_backbone(
        recipe.model, device=device, embedded_guidance=recipe.guidance.embedded
    )
    trio = _trio_of(recipe, objective, backbone, start)
    if recipe.model.base_weights is not None:
        trio.code_base(recipe.model.base_weights, device=device)
    return trio


def build_empty_trio(
    recipe: Recipe, *, start: Adapter | None = None
) -> tuple[Trio, dict[str, StoredTensor]]:
    """`build_trio` for a base that doesn't fit whole: LoRA and heads are real, the base is empty.

    Adapters and heads have the same values as in `build_trio`, on the CPU. Shard the trio's one
    module, then `piflow.sharding.weights.fill` it. Nothing is in codes yet.

    Returns:
        The trio, and where each of the base's parameters without storage lies, by module name.

    Raises:
        ValueError: as `build_trio`; or full training, whose students are copies of the base.
    """
    objective = recipe.distillation()
    if recipe.lora is None:
        raise ValueError(
            "lora is null: full training copies the base's values and needs it whole; use "
            "build_trio, or give the recipe a lora section"
        )
    backbone, sources = load_empty_backbone(
        recipe.model, embedded_guidance=recipe.guidance.embedded
    )
    trio = _trio_of(recipe, objective, backbone, start)
    (module,) = trio.modules
    return trio, missing(module, sources)


def _trio_of(
    recipe: Recipe, objective: PiIDConfig, backbone: Backbone, start: Adapter | None
) -> Trio:
    if start is not None:
        check_start(recipe, start, backbone)
    trio = Trio.from_backbone(
        backbone,
        recipe.lora,
        recipe.policy,
        PolicyClock.of(FewStep.of(objective)),
        generator=torch.Generator().manual_seed(recipe.seed),
        teacher_lora=read_teacher_lora(recipe.model),
    )
    if start is not None:
        trio.begin_as(start.tensors)
    return trio
