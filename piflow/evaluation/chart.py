"""Line charts as SVG: a template draws what is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from piflow.evaluation.metrics import Interval

WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_STEPS = (1, 2, 2.5, 5, 10)
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        points: (x, value and interval), x ascending.
        is_dashed: so that it is told apart without colours.
    """

    label: str
    points: Sequence[tuple[float, Interval]]
    is_dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A value where the chart has it.

    Attributes:
        x, y: pixels.
        low, high: the interval's ends, y in pixels.
    """

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A series in pixels; `number` chooses its colour."""

    label: str
    number: int
    is_dashed: bool
    marks: tuple[Mark, ...]

    @property
    def path(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """What the template draws, in pixels."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def chart(title: str, x_label: str, series: Sequence[Series]) -> Chart | None:
    """Lines with intervals over whole numbers.

    Infinite values, such as the PSNR of a picture without error, are left out; None: nothing is
    left.
    """
    finite = [
        Series(
            each.label,
            [(x, value) for x, value in each.points if math.isfinite(value.value)],
            each.is_dashed,
        )
        for each in series
    ]
    points = [point for each in finite for point in each.points]
    if not points:
        return None
    ends = [end for _, value in points for end in (value.value, value.low, value.high)]
    ends = [end for end in ends if math.isfinite(end)]
    y_values = ticks(min(ends), max(ends))
    xs = sorted({x for x, _ in points})
    low, high = min(y_values[0], *ends), max(y_values[-1], *ends)

    def across(x: float) -> float:
        span = xs[-1] - xs[0] or 1
        share = (x - xs[0]) / span if len(xs) > 1 else 0.5
        return _LEFT + 8 + share * (WIDTH - _RIGHT - _LEFT - 16)

    def down(y: float) -> float:
        share = (min(max(y, low), high) - low) / (high - low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)

    lines = [
        Line(
            each.label,
            number,
            each.is_dashed,
            tuple(
                Mark(across(x), down(value.value), down(value.low), down(value.high))
                for x, value in each.points
            ),
        )
        for number, each in enumerate(finite)
        if each.points
    ]
    return Chart(
        title,
        x_label,
        tuple(Tick(across(x), f"{x:g}") for x in xs),
        tuple(Tick(down(y), f"{y:g}".replace("-", "−")) for y in y_values),
        tuple(lines),
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`; at least two, at most eight."""
    if not high > low:
        spread = abs(low) / 10 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in _STEPS if power * each >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]
