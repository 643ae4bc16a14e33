"""A recipe on machines that nobody has rented yet: memory, work, traffic, time and money.

`Planner` counts a recipe's model once and then plans any number of ways to run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from piflow.backbones.load import DTYPES
from piflow.config import PiIDConfig, Recipe, RecipeError, parse_recipe
from piflow.planning.hardware import Efficiency, PlanError, Table
from piflow.planning.memory import (
    SAFE_SHARE,
    SHARDED,
    Memory,
    Placement,
    StrategyName,
    fits,
    memory_of,
    micro_batches,
    segments,
)
from piflow.planning.model import Model, backbone_of, model_of
from piflow.planning.passes import PHASES, TEACHER, Passes, Passing
from piflow.planning.settling import settle
from piflow.planning.sizes import condition_size, latent_size
from piflow.planning.speed import Machines, Speed, context_bytes, speed_of
from piflow.planning.traffic import Collective, teacher_calls, traffic

_MOST_NODES, _MOST_GPUS = 10_000, 64
_STATE = 4 + 4 + 8  # bytes a trained value in a checkpoint: weight, average, both moments


@dataclass(frozen=True)
class Stored:
    """Bytes on storage.

    Attributes:
        prompt: one prompt's row, with all token states; pictures' latents included.
        run: all rows that the run reads, if it reads each once.
        checkpoint: one.
        checkpoints: all that are kept at once.
        adapter: what is exported, in bfloat16.
    """

    prompt: int
    run: int
    checkpoint: int
    checkpoints: int
    adapter: int


@dataclass(frozen=True)
class Work:
    """What a step takes, whatever computes it.

    Attributes:
        flops: phase -> (kind, dtype) -> operations of a step, over all workers.
    """

    recipe: Recipe
    model: Model
    placement: Placement
    passes: Passes
    memory: Memory
    flops: Mapping[str, Mapping[tuple[str, str], int]]
    traffic: tuple[Collective, ...]


@dataclass(frozen=True)
class Plan:
    """What a run comes to; all of it is predicted.

    Attributes:
        flops: phase -> (kind, dtype) -> operations of a step, over all workers.
        free: bytes of a GPU that PyTorch may have.
        usd_per_gpu_hour: None: no price is known.
        start_hours: until the first step.
        notes: what the recipe leaves open, as it is decided here.
    """

    recipe: Recipe
    model: Model
    machines: Machines
    placement: Placement
    why: str
    passes: Passes
    memory: Memory
    free: int
    flops: Mapping[str, Mapping[tuple[str, str], int]]
    traffic: tuple[Collective, ...]
    speed: Speed
    stored: Stored
    start_hours: float
    usd_per_gpu_hour: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether a worker's memory is enough."""
        return fits(self.memory, self.free)

    @property
    def images_per_second(self) -> float:
        """Of all workers."""
        return self.recipe.training.batch_size / self.speed.step

    @property
    def hours(self) -> float:
        """From the first machine to the last step."""
        return self.start_hours + self.recipe.training.steps * self.speed.step / 3600

    @property
    def usd(self) -> float | None:
        """What the GPUs cost; None: no price is known."""
        if self.usd_per_gpu_hour is None:
            return None
        return self.hours * self.machines.world * self.usd_per_gpu_hour

    @property
    def checkpointing(self) -> str:
        """The recipe's activation checkpointing."""
        return self.recipe.runtime.activation_checkpointing


def on_machines(recipe: Recipe, nodes: int, gpus_per_node: int, **runtime: Any) -> Recipe:
    """The recipe with a worker on every GPU, and other runtime keys as given.

    Raises:
        PlanError: numbers that no cluster has, or that the recipe's batch can't use.
    """
    for option, number, most in (
        ("--nodes", nodes, _MOST_NODES),
        ("--gpus-per-node", gpus_per_node, _MOST_GPUS),
    ):
        if not 1 <= number <= most:
            raise PlanError(f"{option} {number}: expected a number from 1 to {most}")
    world, training = nodes * gpus_per_node, recipe.training
    most = training.batch_size // training.micro_batch_size * recipe.runtime.context_parallel
    if world > most:
        raise PlanError(
            f"{nodes} nodes of {gpus_per_node} GPUs are {world} workers, and a step of "
            f"training.batch_size / training.micro_batch_size has work for {most}; use at most "
            f"{most} GPUs, or a larger batch"
        )
    tree = recipe.model_dump(mode="json")
    tree["runtime"] = {**tree["runtime"], "num_workers": world, "use_gpu": True, **runtime}
    try:
        return parse_recipe(tree)
    except RecipeError as error:
        told = str(error).splitlines()[-1].strip(" -")
        raise PlanError(f"{nodes} nodes of {gpus_per_node} GPUs: {told}") from error


class Planner:
    """Plans for one recipe and table; the model is counted when it is first needed.

    Args:
        published: a recipe's model that isn't there is stood for by its family's best known one.

    Raises:
        ValueError: a model or LoRA target that doesn't fit, or no model at all.
    """

    def __init__(self, recipe: Recipe, table: Table, *, published: bool = True) -> None:
        self.recipe = recipe
        self.table = table
        backbone, source = backbone_of(recipe, published=published)
        self.model = model_of(recipe, backbone, source)
        self._published = published
        self._passing: dict[int, Passing] = {
            recipe.training.micro_batch_size: Passing(recipe, backbone)
        }

    def plan(
        self, machines: Machines, *, usd: float | None = None, recipe: Recipe | None = None
    ) -> Plan:
        """The recipe, or one of another runtime, batch, optimiser or `base_weights`, on machines.

        Args:
            machines: with as many GPUs as the recipe has workers, see `on_machines`.
            usd: of a GPU, an hour.

        Raises:
            PlanError: as `speed_of`.
        """
        recipe = recipe or on_machines(self.recipe, machines.nodes, machines.gpus_per_node)
        efficiency = self.table.efficiency
        context = context_bytes(efficiency, machines.world)
        free = machines.gpu.memory - context
        passes = self.passes(recipe)
        placement, _, why = placed(recipe, self.model, passes, machines.world, free, context)
        settled = settle(recipe, self.model, passes, placement, free, context=context)
        recipe = settled.recipe
        work = self.work(recipe, placement, context=context)
        return Plan(
            recipe=recipe,
            model=self.model,
            machines=machines,
            placement=placement,
            why=why,
            passes=passes,
            memory=work.memory,
            free=free,
            flops=work.flops,
            traffic=work.traffic,
            speed=self.speed(work, machines),
            stored=_stored(recipe, self.model),
            start_hours=_start_hours(self.model, efficiency),
            usd_per_gpu_hour=usd,
            notes=settled.reasons,
        )

    def work(self, recipe: Recipe, placement: Placement, *, context: int = 0) -> Work:
        """A step of the recipe, which leaves nothing open, on workers that are placed so.

        Args:
            recipe: as for `plan`.
            context: bytes of a device that aren't PyTorch's.
        """
        passes = self.passes(recipe)
        return Work(
            recipe=recipe,
            model=self.model,
            placement=placement,
            passes=passes,
            memory=memory_of(recipe, self.model, passes, placement, context=context),
            flops=_flops(recipe, passes),
            traffic=tuple(traffic(recipe, self.model, placement)),
        )

    def speed(self, work: Work, machines: Machines) -> Speed:
        """How long that step takes on machines.

        Raises:
            PlanError: as `speed_of`.
        """
        return speed_of(
            work.recipe,
            work.model,
            work.passes,
            work.placement,
            work.traffic,
            machines,
            self.table.efficiency,
        )

    def passes(self, recipe: Recipe) -> Passes:
        """Of the recipe's micro-batch and activation checkpointing."""
        size = recipe.training.micro_batch_size
        if size not in self._passing:
            backbone, _ = backbone_of(recipe, published=self._published)
            self._passing[size] = Passing(recipe, backbone)
        return self._passing[size].measure(recipe.runtime.activation_checkpointing)


def placed(
    recipe: Recipe, model: Model, passes: Passes, world: int, free: int, context: int = 0
) -> tuple[Placement, Memory, str]:
    """Where a recipe's strategy puts what, what that takes, and why it is this strategy.

    `auto` keeps replicas where they fit `free` bytes, and cuts shards where they don't.
    """
    runtime = recipe.runtime

    def estimate(name: StrategyName) -> tuple[Placement, Memory]:
        shard = (runtime.shard_size or world) if name in SHARDED else 1
        placement = Placement(name, world, shard if name == "fsdp" else max(shard, 1))
        return placement, memory_of(recipe, model, passes, placement, context=context)

    if world == 1 and runtime.offload != "cpu":
        return *estimate("single"), "there is one worker"
    if runtime.strategy == "deepspeed":
        stage = 2 if runtime.deepspeed is None else runtime.deepspeed.stage
        names: dict[int, StrategyName] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return *estimate(names[stage]), "runtime.strategy says so"
    if runtime.strategy in ("fsdp", "ddp"):
        name: StrategyName = "fsdp" if runtime.strategy == "fsdp" else "ddp"
        return *estimate(name), "runtime.strategy says so"
    whole = estimate("ddp")
    if recipe.model.base_weights is not None:
        return *whole, f"a base in {recipe.model.base_weights} isn't split"
    if fits(whole[1], free):
        return *whole, f"a whole replica fits in {SAFE_SHARE:.0%} of a GPU"
    return *estimate("fsdp"), f"a whole replica doesn't fit in {SAFE_SHARE:.0%} of a GPU"


def _flops(recipe: Recipe, passes: Passes) -> dict[str, dict[tuple[str, str], int]]:
    training = recipe.training
    rounds = training.batch_size // training.micro_batch_size * segments(recipe)
    times = {TEACHER: rounds * teacher_calls(recipe)}
    return {
        phase: {key: times.get(phase, rounds) * n for key, n in passes.flops(phase).items()}
        for phase in PHASES
        if passes.flops(phase)
    }


def _stored(recipe: Recipe, model: Model) -> Stored:
    embed, training = recipe.embed, recipe.training
    value = 1 if embed.dtype == "fp8" else 2
    prompt = recipe.encoder.text_tokens * model.text_width * value + 4 * model.pooled_width
    pictures = [latent_size(recipe)] if recipe.objective.pictures == "store" else []
    for height, width in (*pictures, *filter(None, [condition_size(recipe)])):
        latent = 2 if embed.latent_dtype == "bf16" else 4
        prompt += latent * model.latent_channels * height * width
    state = _STATE * model.trained
    return Stored(
        prompt=prompt,
        run=prompt * training.steps * training.batch_size,
        checkpoint=state,
        checkpoints=state * (training.keep_last + training.keep_best),
        adapter=DTYPES["bfloat16"].itemsize * model.trained,
    )


def _start_hours(model: Model, efficiency: Efficiency) -> float:
    loading = model.base_bytes / (efficiency.load_gb_per_second * 1e9)
    return efficiency.start_minutes / 60 + loading / 3600


def evenly(recipe: Recipe, world: int) -> bool:
    """Whether all workers have as many micro-batches in a step."""
    training = recipe.training
    total = training.batch_size // training.micro_batch_size
    return micro_batches(recipe, world) * (world // recipe.runtime.context_parallel) == total


def describes(recipe: Recipe) -> str:
    """What the recipe does, in a few words."""
    if not isinstance(recipe.objective, PiIDConfig):
        return "flow-matching pre-training"
    return f"π-ID, {recipe.objective.data} of data, {recipe.objective.nfe} NFE"
