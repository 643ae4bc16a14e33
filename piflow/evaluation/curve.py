"""The student and its teacher over the number of network evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from piflow.config.metrics import COLUMNS, FIGURES
from piflow.evaluation.intervals import Columns, by_prompt, figures_over_other, own_figures
from piflow.evaluation.metrics import Interval


@dataclass(frozen=True)
class Sampled:
    """A method as far as a curve needs it.

    Attributes:
        nfe: network evaluations a picture.
        seconds: a picture; None: not noted.
        columns: as of `own_figures`.
    """

    name: str
    nfe: int
    is_student: bool
    seconds: float | None
    columns: Columns


@dataclass(frozen=True)
class CurvePoint:
    """Student and teacher at one number of network evaluations.

    Attributes:
        student, teacher: the methods' names.
        figures: the student's; where they are over the teacher, over the one in as many steps.
        over_trained: the student's over itself at the number that it was trained for, prompt by
            prompt, under the names that they have over a champion; empty for that number.
        teacher_figures: the same figures with the teacher in as many steps for the student.
        seconds, teacher_seconds: a picture; None: not noted.
    """

    nfe: int
    student: str
    teacher: str
    figures: dict[str, Interval]
    over_trained: dict[str, Interval]
    teacher_figures: dict[str, Interval]
    seconds: float | None
    teacher_seconds: float | None


def curve(methods: Sequence[Sampled]) -> tuple[CurvePoint, ...]:
    """A point for every number that both student and teacher were drawn with, fewest first.

    Args:
        methods: the reference first, the student at its trained number last.
    """
    reference, trained = methods[0], methods[-1]
    teachers = {method.nfe: method for method in methods if not method.is_student}
    students = {method.nfe: method for method in methods if method.is_student}
    points = []
    for nfe in sorted(students.keys() & teachers.keys()):
        student, teacher = students[nfe], teachers[nfe]
        of = [reference.columns, teacher.columns]
        points.append(
            CurvePoint(
                nfe=nfe,
                student=student.name,
                teacher=teacher.name,
                figures=own_figures([*of, student.columns]),
                over_trained={}
                if student is trained
                else figures_over_other(by_prompt(student.columns), by_prompt(trained.columns)),
                teacher_figures=own_figures([*of, teacher.columns]),
                seconds=student.seconds,
                teacher_seconds=teacher.seconds,
            )
        )
    return tuple(points)


def charted(points: Sequence[CurvePoint]) -> list[str]:
    """The figures that a curve has at every point and a chart shows.

    Those of the student itself, and ratios to the reference.
    """
    return [
        name
        for name, figure in FIGURES.items()
        if (
            figure.over is None
            or (figure.over == "reference" and COLUMNS[figure.column].kind == "ratio")
        )
        and all(name in point.figures for point in points)
    ]
