"""Plans for machines and people: JSON, rows of a comparison, and a page with a picture of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from piflow.planning.choices import Fit
from piflow.planning.hardware import Table
from piflow.planning.memory import GIB
from piflow.planning.plan import Plan

WIDTH, HEIGHT, MARGIN = 720, 420, 60  # of the picture
_COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#b9770e", "#16a085", "#7f8c8d", "#2c3e50")


def as_json(found: Fit, plans: Sequence[Plan], table: Table) -> dict[str, Any]:
    """All of a plan, and of a comparison if there is one, in plain values; bytes and seconds."""
    tree: dict[str, Any] = {
        "predicted": True,
        "efficiency": table.efficiency.model_dump(mode="json"),
        "plan": plan_json(found.plan),
    }
    if found.change is not None:
        change = found.change
        tree["change"] = {
            "keys": list(change.keys),
            "same_results": change.same_results,
            "plan": plan_json(change.plan),
        }
    if plans:
        tree["sweep"] = [plan_json(plan) for plan in plans]
    return tree


def plan_json(plan: Plan) -> dict[str, Any]:
    """One plan."""
    where = plan.machines
    return {
        "recipe": plan.recipe.name,
        "model": {
            "source": plan.model.source,
            "parameters": plan.model.parameters,
            "trained": plan.model.trained,
            "head": plan.model.head,
        },
        "machines": {
            "gpu": where.gpu_name,
            "nodes": where.nodes,
            "gpus_per_node": where.gpus_per_node,
        },
        "strategy": str(plan.placement),
        "why": plan.why,
        "decided": list(plan.notes),
        "checkpointing": plan.checkpointing,
        "memory": {**plan.memory.parts(), "total": plan.memory.total, "host": plan.memory.host},
        "gpu_memory": where.gpu.memory,
        "fits": plan.fits,
        "flops": {
            phase: {f"{kind} {dtype}": n for (kind, dtype), n in kinds.items()}
            for phase, kinds in plan.flops.items()
        },
        "traffic": [
            {"kind": c.kind, "phase": c.phase, "bytes": c.nbytes, "sent": c.sent}
            for c in plan.traffic
        ],
        "step_seconds": plan.speed.step,
        "phases": {
            name: {
                "compute": phase.compute,
                "communication": phase.communication,
                "waiting": phase.waiting,
            }
            for name, phase in plan.speed.phases.items()
        },
        "images_per_second": plan.images_per_second,
        "hours": plan.hours,
        "usd": plan.usd,
        "usd_per_gpu_hour": plan.usd_per_gpu_hour,
        "stored": {
            "prompt": plan.stored.prompt,
            "run": plan.stored.run,
            "checkpoint": plan.stored.checkpoint,
            "checkpoints": plan.stored.checkpoints,
            "adapter": plan.stored.adapter,
        },
    }


def best(plans: Sequence[Plan]) -> list[Plan]:
    """The cheapest way that fits for each GPU and number of machines, cheapest first."""
    chosen: dict[tuple[str, int], Plan] = {}
    for plan in plans:
        key = (plan.machines.gpu_name, plan.machines.nodes)
        if plan.fits and (key not in chosen or plan.hours < chosen[key].hours):
            chosen[key] = plan
    return sorted(chosen.values(), key=lambda plan: (plan.usd is None, plan.usd or plan.hours))


def sweep_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """A row of text for each of `best`."""
    return [
        [
            f"{plan.machines.nodes} x {plan.machines.gpus_per_node} {plan.machines.gpu_name}",
            str(plan.placement) + (" offloaded" if plan.memory.host else ""),
            plan.checkpointing,
            f"{plan.memory.total / GIB:.1f}",
            f"{plan.speed.step:.2f}",
            f"{plan.images_per_second:.1f}",
            f"{plan.hours:,.1f}",
            "-" if plan.usd is None else f"{plan.usd:,.0f}",
        ]
        for plan in best(plans)
    ]


def page(plan: Plan, plans: Sequence[Plan], table: Table) -> str:
    """The comparison as one HTML page: a picture of cost over time, and the table."""
    template = files("piflow.planning").joinpath("sweep.html.j2").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        plan=plan,
        rows=sweep_rows(plans),
        points=_points(plans),
        ticks=_ticks(plans),
        prices=table.prices,
        efficiency=table.efficiency,
        size=(WIDTH, HEIGHT, MARGIN),
    )


def _priced(plans: Sequence[Plan]) -> list[Plan]:
    return [plan for plan in best(plans) if plan.usd]


def _points(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Where each plan lies; both axes are logarithmic."""
    priced = _priced(plans)
    across, up = (_axis(values) for values in _values(priced))
    names = list(dict.fromkeys(plan.machines.gpu_name for plan in priced))
    return [
        {
            "x": MARGIN + across(plan.hours) * (WIDTH - 2 * MARGIN),
            "y": HEIGHT - MARGIN - up(plan.usd or 1.0) * (HEIGHT - 2 * MARGIN),
            "colour": _COLOURS[names.index(plan.machines.gpu_name) % len(_COLOURS)],
            "label": f"{plan.machines.nodes} x {plan.machines.gpus_per_node} "
            f"{plan.machines.gpu_name} {plan.placement}",
        }
        for plan in priced
    ]


def _ticks(plans: Sequence[Plan]) -> dict[str, list[dict[str, Any]]]:
    hours, money = _values(_priced(plans))
    across, up = _axis(hours), _axis(money)
    return {
        "x": [
            {"at": MARGIN + across(v) * (WIDTH - 2 * MARGIN), "text": f"{v:g} h"}
            for v in _round_values(hours)
        ],
        "y": [
            {"at": HEIGHT - MARGIN - up(v) * (HEIGHT - 2 * MARGIN), "text": f"{v:,g} USD"}
            for v in _round_values(money)
        ],
    }


def _values(plans: Sequence[Plan]) -> tuple[list[float], list[float]]:
    return [plan.hours for plan in plans], [plan.usd or 1.0 for plan in plans]


def _axis(values: Sequence[float]) -> Any:
    """A function value -> [0, 1] over the values' range."""
    low = math.log(min(values, default=1.0)) - 0.1
    high = math.log(max(values, default=1.0)) + 0.1
    return lambda value: (math.log(value) - low) / (high - low)


def _round_values(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten that lie among the values."""
    if not values:
        return []
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**p for p in powers for step in (1, 2, 5) if low <= step * 10.0**p <= high]
