"""What measured columns say of the student: its figures, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from piflow.config.metrics import COLUMNS, FIGURES, Figure, figures_over
from piflow.evaluation.metrics import (
    Interval,
    difference_interval,
    diversity_ratio_interval,
    mean_interval,
    psnr_gain_interval,
    psnr_interval,
    psnr_of_error,
)

Columns = Mapping[str, Tensor]
"""A method's columns by name: ``(P,)`` float64 with a number for each prompt, or ``()`` with one of
all pictures.
"""


def own_figures(methods: Sequence[Columns]) -> dict[str, Interval]:
    """The student's figures by themselves and over its teacher, as far as they were measured.

    Args:
        methods: as of `Evaluation`: the reference first, the teacher in as many steps last but one,
            the student last.
    """
    others = {"few_steps": methods[-2], "reference": methods[0], None: None}
    wanted = figures_over(champion=False, measured=methods[-1])
    return {
        name: _interval(figure, methods[-1], others[figure.over]) for name, figure in wanted.items()
    }


def figures_of_other(methods: Sequence[Columns]) -> dict[str, Interval]:
    """The figures of a model that is no student of this teacher: those that don't name it.

    Args:
        methods: as of `own_figures`, with the model in the student's place.
    """
    found = own_figures(methods)
    return {name: value for name, value in found.items() if FIGURES[name].over != "few_steps"}


def by_prompt(columns: Columns) -> dict[str, Tensor]:
    """Those with a number for each prompt."""
    return {name: values for name, values in columns.items() if values.dim() == 1}


def figures_over_other(ours: Columns, theirs: Columns) -> dict[str, Interval]:
    """The student's figures over another's, whose rows are of the same prompts and noise."""
    wanted = figures_over(champion=True, measured=ours.keys() & theirs.keys())
    return {name: _interval(figure, ours, theirs) for name, figure in wanted.items()}


def _interval(figure: Figure, student: Columns, other: Columns | None) -> Interval:
    kind, values = COLUMNS[figure.column].kind, student[figure.column]
    if kind == "whole":
        value = float(values)
        return Interval(value, value, value)
    if other is None:
        return psnr_interval(values) if kind == "error" else mean_interval(values)
    if kind == "error":
        return psnr_gain_interval(values, other[figure.column])
    if kind == "ratio":
        return diversity_ratio_interval(values, other[figure.column])
    return difference_interval(values, other[figure.column])


def summary(column: str, values: Tensor) -> float:
    """A column of a method in one number: a PSNR in dB, or the mean."""
    mean = values.mean()
    return float(psnr_of_error(mean) if COLUMNS[column].kind == "error" else mean)
