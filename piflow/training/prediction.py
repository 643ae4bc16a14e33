"""What `piflow plan` predicts for the GPUs that a run has got, to lie beside what is measured."""

from __future__ import annotations

import torch

from piflow.config import Recipe
from piflow.planning.hardware import Table, load_table
from piflow.planning.memory import GIB
from piflow.planning.plan import Planner
from piflow.planning.speed import Machines

_NEAR = 0.05  # share by which a GPU's memory may differ from the table's


def predicted(
    recipe: Recipe, device: torch.device, world_size: int, on_this_machine: int
) -> dict[str, float]:
    """MLflow metrics; none on a CPU, on GPUs that the table lacks, or on uneven machines.

    Args:
        on_this_machine: workers there.
    """
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return predicted_on(
        recipe, properties.name, properties.total_memory, world_size, on_this_machine
    )


def predicted_on(
    recipe: Recipe, gpu: str, memory: int, world_size: int, on_this_machine: int
) -> dict[str, float]:
    """The same for a GPU that calls itself `gpu` and has `memory` bytes."""
    table = load_table()
    kind = kind_of(gpu, memory, table)
    if kind is None or world_size % on_this_machine:
        return {}
    machines = Machines(kind, table.gpus[kind], world_size // on_this_machine, on_this_machine)
    try:
        plan = Planner(recipe, table, published=False).plan(machines)
    except ValueError:  # what is wrong with it, loading the model says better
        return {}
    return {
        "predicted_step_seconds": plan.speed.step,
        "predicted_samples_per_second": plan.images_per_second,
        "predicted_memory_gib": plan.memory.total / GIB,
    }


def kind_of(gpu: str, memory: int, table: Table) -> str | None:
    """The table's name of a GPU: h100-80gb of "NVIDIA H100 80GB HBM3"; None: it has none."""
    words = gpu.lower().replace("-", " ").split()
    for name, entry in table.gpus.items():
        model, *rest = name.split("-")
        near = abs(memory - entry.memory) <= _NEAR * entry.memory
        if model in words and near and ("pcie" in rest) == ("pcie" in words):
            return name
    return None
