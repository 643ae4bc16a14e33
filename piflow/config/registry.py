"""What a version must show before an alias of the model registry moves to it."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field, field_validator

from piflow.config.metrics import FIGURES, has_interval
from piflow.config.section import Section, Text
from piflow.storage.foreign import shown

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_GATE = re.compile(r"\s*([A-Za-z_]\w*)(?:\.(\w+))?\s*([<>=!]+)\s*(\S+)\s*", re.ASCII)
_BOUNDS = ("low", "mean", "high")
_EXAMPLE = '"psnr_gain_db.low > 0"'


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        text: as it was written.
        figure: a key of `FIGURES`.
        bound: "low" or "high" end of the figure's 95 % interval, or "mean": the figure itself.
        comparison: ">", ">=", "<" or "<=".
        limit: in the metric's unit.
    """

    text: str
    figure: str
    bound: str
    comparison: str
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a figure passes; no NaN does."""
        return _HOLDS[self.comparison](value, self.limit)


def parse_gate(text: str) -> Gate:
    """A gate from ``METRIC[.low|.mean|.high] COMPARISON NUMBER``.

    Raises:
        ValueError: it is written otherwise; an unknown figure is told with the known ones. Or it
            asks for an end of an interval that a figure of all pictures doesn't have.
    """
    said = shown(repr(text))
    found = _GATE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"expected METRIC COMPARISON NUMBER, such as {_EXAMPLE}, with .low, .mean or .high "
            f"after the metric, got {said}"
        )
    figure, bound, comparison, number = found.groups()
    if figure not in FIGURES:
        close = difflib.get_close_matches(figure, FIGURES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"{said}: unknown metric {shown(figure)}, known: {', '.join(FIGURES)}{hint}"
        )
    if bound is not None and bound not in _BOUNDS:
        raise ValueError(f"{said}: expected .{', .'.join(_BOUNDS)} or nothing, got .{shown(bound)}")
    if bound in ("low", "high") and not has_interval(figure):
        raise ValueError(
            f"{said}: {figure} is one number of all pictures, without an interval over prompts; "
            f"write {figure} {comparison} {number}"
        )
    if comparison not in _HOLDS:
        raise ValueError(f"{said}: expected {', '.join(_HOLDS)}, got {comparison}")
    return Gate(text.strip(), figure, bound or "mean", comparison, _limit(number, said))


def _limit(number: str, said: str) -> float:
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ValueError(f"{said}: expected a finite number, got {shown(number)}")
    return limit


class RegistryConfig(Section):
    """What `piflow promote` asks of a version before an alias moves to it."""

    gates: list[Text] = Field(
        [
            "psnr_gain_db.low > 0",
            "diversity_ratio.low >= 0.95",
            "psnr_over_champion_db.low > 0",
        ],
        max_length=50,
    )
    """Conditions that must all hold, METRIC[.low, .mean or .high] COMPARISON NUMBER: the metric's
    95 % interval over prompts, or the figure itself. Those over the champion are about the version
    that has the alias, on the same prompts and noise; without one they hold. An empty list asks
    for nothing.
    """

    @field_validator("gates")
    @classmethod
    def _are_gates(cls, gates: list[str]) -> list[str]:
        for gate in gates:
            parse_gate(gate)
        return gates

    def parsed(self) -> list[Gate]:
        """The gates, in order."""
        return [parse_gate(gate) for gate in self.gates]
