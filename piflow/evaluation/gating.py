"""Whether a recipe's gates hold for what was measured, and by how much they don't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piflow.config import Gate
from piflow.config.metrics import has_interval
from piflow.evaluation.metrics import Interval


@dataclass(frozen=True)
class Verdict:
    """A gate and what came of it; `told` says so with the figure."""

    gate: Gate
    holds: bool
    told: str


def judge(gates: Sequence[Gate], figures: Mapping[str, Interval | str]) -> list[Verdict]:
    """Every gate's verdict, in order.

    Args:
        figures: by name, or why there is none, which fails its gates. Gates of a figure that isn't
            named hold: those over a champion where there is none.
    """
    return [_verdict(gate, figures.get(gate.figure)) for gate in gates]


def _verdict(gate: Gate, figure: Interval | str | None) -> Verdict:
    if figure is None:
        return Verdict(gate, True, "there is no champion to compare with")
    if isinstance(figure, str):
        return Verdict(gate, False, f"can't be judged: {figure}")
    ends = {"low": figure.low, "mean": figure.value, "high": figure.high}
    value = ends[gate.bound]
    told = f"{value:.4g}"
    if has_interval(gate.figure):
        told += f" (measured {figure.value:.4g}, 95 % {figure.low:.4g} to {figure.high:.4g})"
    if gate.holds(value):
        return Verdict(gate, True, told)
    amount = f"{abs(value - gate.limit):.4g} too {'low' if '>' in gate.comparison else 'high'}"
    return Verdict(gate, False, f"{told}: {amount}")
