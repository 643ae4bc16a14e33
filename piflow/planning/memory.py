"""What a worker's memory holds, part by part, for a way to spread the model over the workers.

    weights         the frozen base, in its own dtype or in codes
    lora, heads     the student's trained weights, float32; without adapters all of its weights
    ema             their averages, float32
    gradients       float32, of all trained weights
    optimizer       its state
    activations     what the student's forward pass keeps for its backward pass
    policy          what the policy's rollouts and the losses keep besides
    working         the most that passes, or the optimiser's step, hold for a moment beyond that
    gathered        weights that are whole while a unit computes (FSDP, ZeRO stage 3), or while a
                    product does, of a base in codes
    fp8             the teacher's weight that is being quantised, and codes that are kept
    buffers         of collectives, and the prompts of this step and the next
    context         CUDA's context and NCCL's channels: assumed

A replica holds all of it. Sharded workers hold a part of the weights, averages and states; what is
offloaded lies in host memory instead. Sizes of passes are counted (`passes.py`), all else follows
from the model's shapes (`model.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from piflow.config import DeepSpeedConfig, PiIDConfig, Recipe
from piflow.config.model import BaseWeights
from piflow.planning.model import Model, Unit, Weight
from piflow.planning.passes import Passes
from piflow.planning.sizes import condition_size, latent_size
from piflow.roles.base_weights import can_be_coded, coded_bytes

SAFE_SHARE = 0.85  # of the free memory: the rest is for kernels' workspaces and fragmentation
GIB = 2**30

StrategyName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
SHARDED: tuple[StrategyName, ...] = ("fsdp", "zero3")

_FLOAT = 4
_OPTIMIZER: Mapping[str, int] = {"adamw": 8, "adamw8bit": 2, "muon": 8}  # bytes a value, at most
_FP8_WORKSPACE = 1 + 4 + 4  # bytes a value of a weight: code, float32 copy, that over its scale
_WHOLE_WORKSPACE: Mapping[BaseWeights, tuple[int, int]] = {
    "int8": (8, 1),  # bytes a value, and values of the weight's dtype: two in float32; the weight
    "nf4": (8, 3),  # indices in 64 bits; three copies of all values
}
_DDP_BUCKET = 2 * 64 * 2**20  # gradients laid end to end, and the quotient


@dataclass(frozen=True)
class Placement:
    """How the model is spread.

    Attributes:
        strategy: what splits it.
        world: workers, a GPU each.
        shard: workers that hold one copy of what is split.
    """

    strategy: StrategyName
    world: int
    shard: int

    @property
    def parts(self) -> int:
        """Into how many the frozen weights are cut."""
        return self.shard if self.strategy in SHARDED else 1

    def __str__(self) -> str:
        if self.strategy == "fsdp" and self.shard < self.world:
            return f"hsdp({self.shard})"
        return self.strategy


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at a step's peak; `host` of them in host memory, all else on the GPU."""

    weights: int
    lora: int
    heads: int
    ema: int
    gradients: int
    optimizer: int
    activations: int
    policy: int
    working: int
    gathered: int
    fp8: int
    buffers: int
    context: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts().values())

    @property
    def own(self) -> int:
        """Of which PyTorch allocates."""
        return self.total - self.context

    def parts(self) -> dict[str, int]:
        """Name -> bytes, of what lies on the device."""
        names = (entry.name for entry in fields(self) if entry.name != "host")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        told = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in self.parts().items() if size >= GIB / 200
        )
        host = f", and {self.host / GIB:.2f} GiB of host memory" if self.host else ""
        return f"{self.total / GIB:.2f} GiB ({told}){host}"


def fits(needed: Memory, free: int) -> bool:
    """Whether a worker fits `free` bytes without its context; `SAFE_SHARE` are counted on."""
    return needed.own <= SAFE_SHARE * free


def passes_a_step(recipe: Recipe, world: int) -> int:
    """Backward passes that a worker makes in a step: one a segment and micro-batch."""
    return micro_batches(recipe, world) * segments(recipe)


def micro_batches(recipe: Recipe, world: int) -> int:
    """Micro-batches of a step that a worker computes; those with fewer repeat their last."""
    training = recipe.training
    groups = world // recipe.runtime.context_parallel
    return -(-(training.batch_size // training.micro_batch_size) // groups)


def segments(recipe: Recipe) -> int:
    """Segments of a micro-batch: all where training starts from noise, else one."""
    objective = recipe.objective
    return objective.nfe if isinstance(objective, PiIDConfig) and objective.data == "free" else 1


def memory_of(
    recipe: Recipe, model: Model, passes: Passes, placement: Placement, *, context: int = 0
) -> Memory:
    """The estimate for a worker.

    Args:
        passes: with the recipe's activation checkpointing.
        context: bytes that aren't PyTorch's.
    """
    parts, trained = placement.parts, _FLOAT * model.trained
    state = _OPTIMIZER[recipe.training.optimizer.type] * model.trained
    split = placement.world if placement.strategy.startswith("zero") else parts
    update = trained // split  # what a step of the optimiser computes with, beside its state
    cut = recipe.runtime.context_parallel
    activations, policy = passes.kept // cut, passes.policy // cut
    gathered = _gathered(recipe, model, placement)
    lora = _FLOAT * (model.trained - model.head)
    held = activations + policy + gathered  # not by then
    memory = Memory(
        weights=-(-base_bytes(recipe, model) // parts),
        lora=-(-lora // parts),
        heads=-(-_FLOAT * model.head // parts),
        ema=-(-trained // parts),
        gradients=_gradients(recipe, trained, placement),
        optimizer=-(-state // split),
        activations=activations,
        policy=policy,
        working=max(passes.working // cut, update - held),
        gathered=gathered,
        fp8=_fp8(recipe, model, parts),
        buffers=_buffers(recipe, placement) + _prompts(recipe, model, placement.world),
        context=context,
    )
    return _offloaded(recipe, memory, placement)


def base_bytes(recipe: Recipe, model: Model) -> int:
    """Of the frozen base: as it is, or as `model.base_weights` has it."""
    kind = recipe.model.base_weights
    if kind is None:
        return model.base_bytes
    return model.base_bytes - sum(
        weight.nbytes - coded_bytes(weight.shape, weight.itemsize, kind)
        for weight in weights_in_codes(recipe, model)
    )


def weights_in_codes(recipe: Recipe, model: Model) -> list[Weight]:
    """The base's weights that `model.base_weights` puts into codes."""
    kind = recipe.model.base_weights
    if kind is None:
        return []
    return [
        weight
        for unit in model.student
        for weight in unit.weights
        if weight.linear and can_be_coded(weight.shape, kind)
    ]


def _made_whole(recipe: Recipe, model: Model) -> int:
    """The largest weight in codes while it is made whole, and what torchao keeps meanwhile."""
    kind = recipe.model.base_weights
    if kind is None:
        return 0
    fixed, values = _WHOLE_WORKSPACE[kind]
    return max(
        (w.numel * (fixed + values * w.itemsize) for w in weights_in_codes(recipe, model)),
        default=0,
    )


def reshards(recipe: Recipe) -> bool:
    """Whether FSDP's blocks are gathered for each pass; so too where the recipe leaves it open."""
    return recipe.runtime.reshard_after_forward is not False


def keeps_codes(recipe: Recipe) -> bool:
    """Whether the recipe says that an fp8 teacher's weights are quantised once."""
    return recipe.model.fp8_teacher is not None and bool(recipe.model.fp8_teacher.keep_weights)


def keeping_codes(recipe: Recipe, keep: bool) -> Recipe:
    """The recipe with `keep_weights` as given; it has an fp8 teacher.

    Raises:
        ValueError: it has none.
    """
    if recipe.model.fp8_teacher is None:
        raise ValueError("expected a recipe with model.fp8_teacher, it is null")
    fp8 = recipe.model.fp8_teacher.model_copy(update={"keep_weights": keep})
    model = recipe.model.model_copy(update={"fp8_teacher": fp8})
    return recipe.model_copy(update={"model": model})


def may_keep_codes(recipe: Recipe, strategy: str) -> bool:
    """Whether weights can be kept where the recipe leaves it open (`keep_weights` is null).

    DeepSpeed's stage 3 can't, nor FSDP where part of a block is computed again; and FSDP whose
    blocks stay whole gains no traffic by it.
    """
    fp8 = recipe.model.fp8_teacher
    if fp8 is None or fp8.keep_weights is not None or strategy == "zero3":
        return False
    runtime = recipe.runtime
    selective = runtime.activation_checkpointing == "selective"
    return strategy != "fsdp" or (reshards(recipe) and not selective)


def _fp8(recipe: Recipe, model: Model, parts: int) -> int:
    if recipe.model.fp8_teacher is None:
        return 0
    kept = sum(code_bytes(weight) for weight in model.coded) if keeps_codes(recipe) else 0
    return model.largest * _FP8_WORKSPACE + -(-kept // parts)


def code_bytes(weight: Weight) -> int:
    """Of a weight's codes and scales, a float32 scale a row."""
    return weight.numel + _FLOAT * weight.shape[0]


def _gradients(recipe: Recipe, trained: int, placement: Placement) -> int:
    """FSDP splits them at a step's last backward pass: until then they add up whole."""
    strategy = placement.strategy
    if strategy in ("zero2", "zero3"):
        return -(-trained // placement.world)
    if strategy == "fsdp" and passes_a_step(recipe, placement.world) == 1:
        return -(-trained // placement.shard)
    return trained


def _gathered(recipe: Recipe, model: Model, placement: Placement) -> int:
    """The rest of the module stays whole while its blocks compute, one after the other.

    The next block comes meanwhile, first as the workers' parts end to end, then as its weights.
    """
    if placement.parts == 1:
        return _made_whole(recipe, model)
    passes = [units for units in (model.student, model.teacher) if units]
    blocks = max(
        (_at_once(recipe, unit) for units in passes for unit in units if _is_block(unit)), default=0
    )
    rest = max(sum(u.nbytes() for u in units if u.part == "rest") for units in passes)
    if placement.strategy == "fsdp" and not reshards(recipe):
        return rest + sum(unit.nbytes() for unit in model.student if unit.part != "rest") + blocks
    return rest + 3 * blocks


def _at_once(recipe: Recipe, unit: Unit) -> int:
    """Bytes of a unit that are whole at one time.

    Where codes are kept, the weights that have some are gathered one by one, or their codes are.
    """
    if not keeps_codes(recipe):
        return unit.nbytes()
    coded = [weight for weight in unit.weights if weight.coded]
    one = max((weight.nbytes for weight in coded), default=0)
    codes = sum(code_bytes(weight) for weight in coded)
    return unit.nbytes() - sum(weight.nbytes for weight in coded) + max(one, codes)


def _is_block(unit: Unit) -> bool:
    return unit.part != "rest"


def _buffers(recipe: Recipe, placement: Placement) -> int:
    if placement.strategy == "ddp":
        return _DDP_BUCKET
    if placement.strategy.startswith("zero"):
        options = recipe.runtime.deepspeed or DeepSpeedConfig()
        return 2 * _FLOAT * options.bucket_values
    return 0


def _prompts(recipe: Recipe, model: Model, world: int) -> int:
    """What a worker's batch brings, twice: the next one comes while a step computes."""
    values = recipe.encoder.text_tokens * model.text_width + model.pooled_width
    pictures = [latent_size(recipe)] if recipe.objective.pictures == "store" else []
    for height, width in (*pictures, *filter(None, [condition_size(recipe)])):
        values += model.latent_channels * height * width
    samples = micro_batches(recipe, world) * recipe.training.micro_batch_size
    return 2 * samples * _FLOAT * values


def _offloaded(recipe: Recipe, memory: Memory, placement: Placement) -> Memory:
    """The same with what the recipe keeps in host memory there."""
    away: tuple[str, ...] = ()
    options = recipe.runtime.deepspeed
    if placement.strategy == "fsdp" and recipe.runtime.offload == "cpu":
        away = ("weights", "lora", "heads", "ema", "optimizer")
        if passes_a_step(recipe, placement.world) == 1:  # else they add up whole on the device
            away = (*away, "gradients")
    elif placement.strategy.startswith("zero") and options is not None:
        away += ("optimizer", "gradients") if options.offload_optimizer == "cpu" else ()
        moved = ("weights", "lora", "heads", "ema")
        away += moved if options.offload_parameters == "cpu" else ()
    sizes = {entry.name: getattr(memory, entry.name) for entry in fields(memory)}
    sizes["host"] = sum(sizes[name] for name in away)
    return Memory(**{**sizes, **dict.fromkeys(away, 0)})
