"""Other ways to run a recipe: the cheapest change that fits, and many ways on one page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from piflow.config import Recipe, parse_recipe
from piflow.config.model import BaseWeights
from piflow.planning.hardware import Gpu, PlanError, Table, load_table
from piflow.planning.passes import CHECKPOINTING
from piflow.planning.plan import Plan, Planner, on_machines
from piflow.planning.speed import Machines

_DDP: dict[str, Any] = {
    "strategy": "ddp",
    "shard_size": None,
    "offload": "none",
    "reshard_after_forward": None,
}
_FSDP = {**_DDP, "strategy": "fsdp"}
_OFFLOADED = {**_FSDP, "offload": "cpu"}
SAVINGS: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "full", "strategy": "fsdp"},
    {"activation_checkpointing": "full", "strategy": "fsdp", "offload": "cpu"},
)
"""Runtime keys that take less of a GPU's memory, those that cost the least time first."""


@dataclass(frozen=True)
class Change:
    """Something else that fits.

    Attributes:
        keys: recipe keys and their new values; empty: the recipe fits as it is, or the machines are
            others.
        plan: what it then comes to.
        same_results: whether a run's results stay what they would have been.
    """

    keys: tuple[str, ...]
    plan: Plan
    same_results: bool = True

    def __str__(self) -> str:
        where = self.plan.machines
        on = f"{where.nodes} x {where.gpus_per_node} {where.gpu_name}"
        what = f"{', '.join(self.keys)} on {on}" if self.keys else f"the recipe as it is on {on}"
        results = "" if self.same_results else "; it changes results"
        return f"{what}{results}"


@dataclass(frozen=True)
class Fit:
    """Whether a recipe fits machines: `plan` as asked, and if it doesn't, the cheapest `change`.

    `change` is None where nothing that is known does.
    """

    plan: Plan
    change: Change | None = None

    @property
    def fits(self) -> bool:
        """Whether the plan does."""
        return self.plan.fits


def fit(
    recipe: Recipe, gpu: str, count: int, *, gpus_per_node: int = 8, table: Table | None = None
) -> Fit:
    """Whether a recipe fits so many GPUs of a kind, and if not the cheapest change that does.

    Nothing is started and no GPU is needed; a model that isn't there is stood for by its family's
    published one.

    Args:
        gpu: name in the table.
        count: GPUs; machines have `gpus_per_node` of them, or all if there are fewer.

    Raises:
        PlanError: an unknown GPU, or a count that no whole machines or workers make.
        ValueError: as `Planner`.
    """
    table = table or load_table()
    each = min(count, gpus_per_node)
    if count < 1 or count % each:
        raise PlanError(f"{count} GPUs aren't whole machines of {gpus_per_node}; use a multiple")
    machines = Machines(gpu, table.gpu(gpu), count // each, each)
    return fitting(Planner(recipe, table), machines)


def fitting(planner: Planner, machines: Machines, usd: float | None = None) -> Fit:
    """`fit` with a planner that may have counted the model already."""
    plan = planner.plan(machines, usd=usd)
    if plan.fits:
        return Fit(plan)
    changes = [change for change in _same_machines(planner, machines, usd) if change.plan.fits]
    if not changes:
        changes = [change for change in _smaller(planner, machines, usd) if change.plan.fits]
    if not changes:
        changes = [change for change in _other_machines(planner, machines) if change.plan.fits]
    return Fit(plan, min(changes, key=_cost, default=None))


def _cost(change: Change) -> tuple[bool, float, int]:
    """Money where a price is known, before GPU hours where none is; then the fewest keys."""
    plan = change.plan
    hours = plan.hours * plan.machines.world
    return plan.usd is None, hours if plan.usd is None else plan.usd, len(change.keys)


def _same_machines(planner: Planner, machines: Machines, usd: float | None) -> Iterator[Change]:
    """The recipe with other ways to place and to recompute, which change no result."""
    for runtime in _runtimes(planner.recipe, machines):
        yield from _changed(planner, machines, usd, planner.recipe, runtime)


def _runtimes(recipe: Recipe, machines: Machines) -> Iterator[dict[str, Any]]:
    """Runtime keys for every pair of a placement and a kind of activation checkpointing."""
    strategies = [_DDP, _FSDP, _OFFLOADED]
    if machines.nodes > 1:
        strategies.insert(1, {**_FSDP, "shard_size": machines.gpus_per_node})
    if machines.world == 1:
        strategies = [{**_FSDP, "strategy": "auto"}, _OFFLOADED]
    if recipe.model.base_weights is not None:  # which isn't split
        strategies = [keys for keys in strategies if keys["strategy"] != "fsdp"]
    kinds = [kind for kind in CHECKPOINTING if kind != "selective" or not recipe.runtime.compile]
    for strategy, kind in product(strategies, kinds):
        yield {**strategy, "deepspeed": None, "activation_checkpointing": kind}


def _changed(
    planner: Planner,
    machines: Machines,
    usd: float | None,
    recipe: Recipe,
    runtime: dict[str, Any],
    extra: Sequence[str] = (),
) -> Iterator[Change]:
    try:
        changed = on_machines(recipe, machines.nodes, machines.gpus_per_node, **runtime)
        plan = planner.plan(machines, usd=usd, recipe=changed)
    except PlanError:  # keys that don't go together, e.g. muon and shards
        return
    before = on_machines(planner.recipe, machines.nodes, machines.gpus_per_node).runtime
    keys = [
        f"runtime.{key}={_plain(getattr(changed.runtime, key))}"
        for key in runtime
        if getattr(changed.runtime, key) != getattr(before, key)
    ]
    yield Change((*keys, *extra), plan, same_results=not extra)


def _plain(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _smaller(planner: Planner, machines: Machines, usd: float | None) -> Iterator[Change]:
    """One sample at a time, a smaller optimiser, the base in codes: all change results."""
    tree = planner.recipe.model_dump(mode="json")
    sizes = {planner.recipe.training.micro_batch_size, 1}
    kinds = {planner.recipe.training.optimizer.type, "adamw8bit"}
    bases = _bases(planner.recipe)
    for size, kind, base in product(sorted(sizes), sorted(kinds), bases):
        training = tree["training"]
        optimizer = {**training["optimizer"], "type": kind}
        changed = {**training, "micro_batch_size": size, "optimizer": optimizer}
        changed_tree = {**tree, "training": changed}
        if base != planner.recipe.model.base_weights:
            changed_tree["model"] = {**tree["model"], "base_weights": base}
            changed_tree["runtime"] = {**tree["runtime"], **_DDP, "deepspeed": None}
        recipe = parse_recipe(changed_tree)
        extra = []
        if base != planner.recipe.model.base_weights:
            extra.append(f"model.base_weights={base}")
        if size != planner.recipe.training.micro_batch_size:
            extra.append(f"training.micro_batch_size={size}")
        if kind != planner.recipe.training.optimizer.type:
            extra.append(f"training.optimizer.type={kind}")
        if extra:
            for runtime in _runtimes(recipe, machines):
                yield from _changed(planner, machines, usd, recipe, runtime, extra)


def _bases(recipe: Recipe) -> list[BaseWeights | None]:
    """What the base may be kept in: as it is, or smaller where the recipe's other keys allow it."""
    model = recipe.model
    if recipe.lora is None or model.fp8_teacher is not None or recipe.runtime.compile:
        return [model.base_weights]
    smaller: dict[BaseWeights | None, list[BaseWeights]] = {None: ["int8", "nf4"], "int8": ["nf4"]}
    return [model.base_weights, *smaller.get(model.base_weights, [])]


def _other_machines(planner: Planner, machines: Machines) -> Iterator[Change]:
    """As many machines of other GPUs, or more of the same."""
    others = [
        Machines(name, gpu, machines.nodes, machines.gpus_per_node)
        for name, gpu in planner.table.gpus.items()
    ]
    others += [
        Machines(machines.gpu_name, machines.gpu, nodes, machines.gpus_per_node)
        for nodes in (2 * machines.nodes, 4 * machines.nodes)
    ]
    for other in others:
        price = planner.table.price(other.gpu_name)
        for runtime in _runtimes(planner.recipe, other):
            usd = None if price is None else price.usd
            yield from _changed(planner, other, usd, planner.recipe, runtime)


def sweep(
    planner: Planner, gpus: dict[str, Gpu], nodes: Sequence[int], gpus_per_node: int
) -> list[Plan]:
    """Every strategy with each kind of checkpointing, on so many machines of each GPU.

    Numbers of machines that the recipe's batch can't use are left out, and so are ways that need
    what a GPU lacks.
    """
    plans = []
    for (name, gpu), number in product(gpus.items(), nodes):
        machines = Machines(name, gpu, number, gpus_per_node)
        price = planner.table.price(name)
        for runtime in _runtimes(planner.recipe, machines):
            try:
                recipe = on_machines(planner.recipe, number, gpus_per_node, **runtime)
                usd = None if price is None else price.usd
                plans.append(planner.plan(machines, usd=usd, recipe=recipe))
            except PlanError:
                continue
    return plans
