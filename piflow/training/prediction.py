"""What `piflow plan` predicts for a run's workers, to lie beside what is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from piflow.config import Recipe
from piflow.planning.hardware import PlanError, Table, load_table
from piflow.planning.memory import GIB, Placement
from piflow.planning.plan import Planner, Work
from piflow.planning.speed import Machines
from piflow.runs.predicted import Prediction, Workers
from piflow.training.placement import Placed

_NEAR = 0.05  # share by which a GPU's memory may differ from the table's


def workers_of(placed: Placed, device: torch.device, here: int, start: int) -> Workers:
    """As rank 0 knows them; arguments as of `Workers`."""
    name, memory = None, 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    placement = placed.placement
    return Workers(
        device=name,
        device_memory=memory,
        world=placement.world,
        here=here,
        shard=placement.shard,
        strategy=placement.strategy,
        start=start,
        recipe=placed.recipe.model_dump(mode="json"),
        reasons=list(placed.reasons),
    )


def predict(workers: Workers) -> Prediction:
    """Figures for these workers; time only for a GPU that the table has, on even machines.

    It takes the time of `piflow plan`: seconds for a small model, a minute of a processor for a
    large one with activation checkpointing.

    Raises:
        ValueError: a model that can't be counted.
        OSError: its config.json can't be read.
    """
    recipe, table = Recipe.model_validate(workers.recipe), load_table()
    placement = Placement(workers.strategy, workers.world, workers.shard)
    planner = Planner(recipe, table, published=False)
    work = planner.work(recipe, placement)
    seconds, why = _time(workers, planner, work, table)
    return Prediction(
        device=workers.device or "CPU",
        workers=workers.world,
        strategy=str(placement),
        start=workers.start,
        parameters=work.model.parameters,
        trained=work.model.trained,
        memory=work.memory.parts(),
        host=work.memory.host,
        operations={phase: sum(kinds.values()) for phase, kinds in work.flops.items()},
        sent=_sent(work),
        batch=recipe.training.batch_size,
        step_seconds=seconds,
        no_time=why,
        reasons=workers.reasons,
    )


def _time(
    workers: Workers, planner: Planner, work: Work, table: Table
) -> tuple[float | None, str | None]:
    """Seconds of a step, or why they aren't known."""
    if workers.device is None:
        return None, "the planner knows GPUs, and the workers compute on CPUs"
    kind = kind_of(workers.device, workers.device_memory, table)
    if kind is None:
        gib = workers.device_memory / GIB
        return None, f"the planner's table has no {workers.device} of {gib:.1f} GiB"
    if workers.world % workers.here:
        return None, f"{workers.world} workers, {workers.here} of them on one machine: not evenly"
    nodes = workers.world // workers.here
    try:
        speed = planner.speed(work, Machines(kind, table.gpus[kind], nodes, workers.here))
    except PlanError as error:
        return None, str(error)
    return speed.step, None


def _sent(work: Work) -> dict[str, int]:
    """Kind and phase -> bytes."""
    sent: dict[str, int] = {}
    for collective in work.traffic:
        name = f"{collective.kind}, {collective.phase}"
        sent[name] = sent.get(name, 0) + collective.sent
    return sent


def kind_of(gpu: str, memory: int, table: Table) -> str | None:
    """The table's name of a GPU: h100-80gb of "NVIDIA H100 80GB HBM3"; None: it has none."""
    words: Sequence[str] = gpu.lower().replace("-", " ").split()
    for name, entry in table.gpus.items():
        model, *rest = name.split("-")
        near = abs(memory - entry.memory) <= _NEAR * entry.memory
        if model in words and near and ("pcie" in rest) == ("pcie" in words):
            return name
    return None
