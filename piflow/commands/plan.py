"""recipe and machines -> what a run would take, as a table, JSON or a page; nothing is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from piflow.config import Recipe
from piflow.planning.choices import Fit, fitting, sweep
from piflow.planning.hardware import Gpu, PlanError, Price, Table, gpu_by_hand, load_table
from piflow.planning.memory import GIB
from piflow.planning.plan import Plan, Planner, describes, evenly
from piflow.planning.report import as_json, page, sweep_rows
from piflow.planning.speed import Machines
from piflow.progress import PlainConsole

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Wanted:
    """Machines as the command line names them.

    Attributes:
        gpu: name in the table, or of one by hand.
        memory, peak, bandwidth: GiB, TFLOP/s, GB/s by hand.
        price: US dollars of a GPU, an hour.
        link, network: GB/s to other GPUs of its machine, Gbit/s of a machine to others.
    """

    gpu: str
    nodes: int = 1
    gpus_per_node: int = 8
    memory: float | None = None
    peak: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    network: float | None = None
    price: float | None = None


def main(
    recipe: Recipe,
    wanted: Wanted,
    *,
    table_path: Path | None = None,
    in_json: bool = False,
    compare: bool = False,
    out: Path | None = None,
) -> Fit:
    """Plan, and print it.

    Args:
        table_path: the user's own table.
        in_json: print JSON and nothing else.
        compare: also strategies, GPUs and numbers of machines.
        out: file for the comparison as a page with a picture.

    Raises:
        ValueError: an unknown GPU, numbers that can't be, or a model that can't be planned.
        OSError: `out` can't be written.
    """
    if wanted.price is not None and not 0 < wanted.price < 1e6:
        raise PlanError(f"--price {wanted.price:g}: expected US dollars above 0")
    table = load_table(table_path)
    gpu = gpu_by_hand(
        table,
        wanted.gpu,
        memory_gb=wanted.memory,
        peak=wanted.peak,
        bandwidth=wanted.bandwidth,
        link=wanted.link,
        network_gbits=wanted.network,
    )
    machines = Machines(wanted.gpu, gpu, wanted.nodes, wanted.gpus_per_node)
    price = table.price(wanted.gpu)
    usd = wanted.price if wanted.price is not None or price is None else price.usd
    planner = Planner(recipe, table)
    found = fitting(planner, machines, usd)
    plans = _compared(planner, table, wanted, gpu) if compare else []
    if out is not None:
        out.write_text(page(found.plan, plans, table))
    if in_json:
        print(json.dumps(as_json(found, plans, table), indent=2, ensure_ascii=False))
        return found
    console = PlainConsole()
    console.print(_table(found, table, price if wanted.price is None else None))
    if compare:
        console.print(_comparison(plans))
        console.print(f"The page with the picture: {out}" if out else "--out FILE.html draws them")
    return found


def _compared(planner: Planner, table: Table, wanted: Wanted, gpu: Gpu) -> list[Plan]:
    gpus = {wanted.gpu: gpu, **{name: g for name, g in table.gpus.items() if name != wanted.gpu}}
    nodes = sorted({1, 2, 4, 8, wanted.nodes})
    return sweep(planner, gpus, nodes, wanted.gpus_per_node)


def _table(found: Fit, table: Table, price: Price | None) -> RichTable:
    plan = found.plan
    efficiency = table.efficiency
    title = f"{plan.recipe.name}: predicted, with efficiencies {efficiency.origin}, not measured"
    if efficiency.origin != "assumed":
        title = f"{plan.recipe.name}: predicted, with efficiencies of {efficiency.origin}"
    rows = RichTable(title=title, show_header=False)
    for row in (
        *_about_model(plan),
        *_about_memory(found),
        *_about_work(plan),
        *_about_time(plan, price),
    ):
        rows.add_row(*row)
    return rows


def _about_model(plan: Plan) -> list[tuple[str, str]]:
    model, where = plan.model, plan.machines
    rows = [
        ("model", f"{plan.recipe.model.family}, {model.source}"),
        ("parameters", f"{model.parameters:,}, trained {model.trained:,} (head {model.head:,})"),
        ("objective", describes(plan.recipe)),
        ("machines", f"{where.nodes} x {where.gpus_per_node} {where.gpu_name}"),
        ("strategy", f"{plan.placement}: {plan.why}; checkpointing {plan.checkpointing}"),
    ]
    rows += [("decided", note) for note in plan.notes]
    if not evenly(plan.recipe, where.world):
        rows.append(("note", "the micro-batches of a step don't divide: some GPUs repeat one"))
    return rows


def _about_memory(found: Fit) -> list[tuple[str, str]]:
    plan = found.plan
    rows = [
        (f"memory: {name}", f"{size / GIB:.2f} GiB")
        for name, size in plan.memory.parts().items()
        if size >= GIB / 200
    ]
    if plan.memory.host:
        rows.append(("host memory", f"{plan.memory.host / GIB:.2f} GiB a GPU"))
    total = f"{plan.memory.total / GIB:.2f} of {plan.machines.gpu.memory / GIB:.2f} GiB"
    if plan.fits:
        return [*rows, ("memory a GPU", f"{total}: fits")]
    rows.append(("memory a GPU", f"{total}: doesn't fit"))
    change = "nothing known to piflow does" if found.change is None else str(found.change)
    rows.append(("the cheapest that does", change))
    if found.change is not None:
        then = found.change.plan
        money = "" if then.usd is None else f", {then.usd:,.0f} USD"
        took = f"{then.memory.total / GIB:.2f} GiB a GPU, {then.hours:,.1f} h{money}"
        rows.append(("which takes", took))
    return rows


def _about_work(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    for phase, kinds in plan.flops.items():
        told = [f"{kind} {dtype} {n / _TERA:,.5g}" for (kind, dtype), n in sorted(kinds.items())]
        rows.append((f"TFLOP a step: {phase}", ", ".join(told)))
    for c in plan.traffic:
        sizes = f"{c.nbytes / _GIGA:,.2f} GB over {c.workers} workers, {c.sent / _GIGA:,.2f} sent"
        rows.append((f"{c.kind}: {c.phase}", sizes))
    return rows


def _about_time(plan: Plan, price: Price | None) -> list[tuple[str, str]]:
    phases = ", ".join(
        f"{name} {phase.seconds:.2f}"
        + (f" (of it waiting {phase.seconds - phase.compute:.2f})" if _waits(phase) else "")
        for name, phase in plan.speed.phases.items()
    )
    training, stored = plan.recipe.training, plan.stored
    cost = "no price known; give --price"
    if plan.usd is not None:
        example = f" (an example: {price})" if price else " (--price)"
        cost = f"{plan.usd:,.0f} USD at {plan.usd_per_gpu_hour:.2f} a GPU and hour{example}"
    return [
        ("step", f"{plan.speed.step:.2f} s: {phases}"),
        ("images", f"{plan.images_per_second:.2f} a second"),
        ("wall time", f"{plan.hours:,.1f} h for {training.steps:,} steps"),
        ("cost", cost),
        ("store", f"{stored.prompt / 1e6:.2f} MB a prompt at most, {stored.run / _GIGA:,.1f} GB "
                  f"if each of {training.steps * training.batch_size:,} is another"),
        ("checkpoints", f"{stored.checkpoint / _GIGA:.2f} GB each, "
                        f"{stored.checkpoints / _GIGA:.2f} GB kept; "
                        f"adapter {stored.adapter / _GIGA:.2f} GB"),
    ]  # fmt: skip


def _waits(phase: Any) -> bool:
    return bool(phase.seconds - phase.compute > 0.005)


def _comparison(plans: Sequence[Plan]) -> RichTable:
    table = RichTable(title="by cost; the cheapest way for each number of machines that fits")
    for column in (
        "GPUs",
        "strategy",
        "checkpointing",
        "GiB",
        "step s",
        "images/s",
        "hours",
        "USD",
    ):
        table.add_column(column, justify="left" if column in ("GPUs", "strategy") else "right")
    for row in sweep_rows(plans):
        table.add_row(*row)
    return table
