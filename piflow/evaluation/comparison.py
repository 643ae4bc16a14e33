"""Several evaluated students on one page, on the prompts that all drew from the same noise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from piflow import storage
from piflow.evaluation.drawing import read_picture
from piflow.evaluation.figures import (
    FOLDER,
    Figures,
    MethodFigures,
    OtherFigures,
    alone,
    over,
    read_figures,
    shared_rows,
)
from piflow.evaluation.intervals import by_prompt, figures_of_other, figures_over_other
from piflow.evaluation.metrics import Interval, psnr_of_error
from piflow.evaluation.report import (
    curve_charts,
    curve_table,
    figure_table,
    inline_jpeg,
    rendered,
)
from piflow.evaluation.sheet import grid, jpeg_bytes
from piflow.inference.pixels import strip
from piflow.storage.foreign import redacted, relative_name
from piflow.storage.picture import MAX_PIXELS

EVALUATION = "evaluation"  # in a run's folder
PICTURES = "pictures"  # in that
SHEET_PROMPTS = 8
_VIDEO_PIXELS = 2 * MAX_PIXELS  # of all frames of a video
MOST = 12  # students: beyond, nobody reads the pairs


@dataclass(frozen=True)
class Student:
    """One column of the comparison.

    Attributes:
        label: that no other one has.
        place: as it was named.
        pictures: URI of its evaluation's folder of pictures.
        figures: of the prompts that all have in common, in the order that all have them in.
        prompts: how many it was evaluated on.
    """

    label: str
    place: str
    pictures: str
    figures: Figures
    prompts: int

    @property
    def method(self) -> MethodFigures:
        return self.figures.student_figures

    @property
    def measured(self) -> dict[str, Interval]:
        return alone(self.figures)


@dataclass(frozen=True)
class Pair:
    """Two students, prompt by prompt.

    Attributes:
        figures: the second one's over the first's, under the names that they have over a champion.
        wins: share of prompts whose pictures are closer to the reference with the second one.
    """

    first: str
    second: str
    figures: dict[str, Interval]
    wins: float


@dataclass(frozen=True)
class OtherRow:
    """Somebody else's model, on the prompts that all share.

    Attributes:
        student: the label of the student that it was evaluated with.
        figures: its own.
        student_over: that student's over it, under the names that they have over a champion.
    """

    label: str
    nfe: int
    same_noise: bool
    student: str
    figures: dict[str, Interval]
    student_over: dict[str, Interval]


@dataclass(frozen=True)
class PromptRow:
    """A prompt and every student's PSNR on it, dB."""

    prompt: str
    psnr: tuple[float, ...]


def read_student(place: str) -> tuple[Figures, str]:
    """The newest figures at a place, and the folder of their pictures.

    Args:
        place: a run's folder, an evaluation's, or a file of figures.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they can't be read.
    """
    if storage.suffix(place) == ".json":
        file = storage.absolute(place)
        pictures = storage.sibling(storage.sibling(file, ""), PICTURES)
        return read_figures(storage.read_bytes(file), redacted(place)), pictures
    for folder in (storage.join(place, EVALUATION), place):
        found = storage.list_files(storage.join(folder, FOLDER))
        names = [name for name in found if name.endswith(".json")]
        if names:
            file = storage.join(folder, FOLDER, max(names))
            pictures = storage.join(folder, PICTURES)
            return read_figures(storage.read_bytes(file), redacted(file)), pictures
    raise FileNotFoundError(
        f"no figures at {redacted(place)}: expected a run's folder, its {EVALUATION}-… folder of "
        f"an adapter, or a file such as {EVALUATION}/{FOLDER}/step_00000320.json, which `piflow "
        "evaluate` writes"
    )


def read_students(places: Sequence[str]) -> list[Student]:
    """The students at some places, each with the figures of the prompts that all have.

    Raises:
        FileNotFoundError: as `read_student`.
        ValueError: as that; not 2 to 12 places, one twice; or they have no prompt with its noise in
            common, or other references.
    """
    if not 2 <= len(places) <= MOST:
        raise ValueError(f"expected 2 to {MOST} runs to compare, got {len(places)}")
    if len({storage.absolute(place) for place in places}) < len(places):
        raise ValueError("expected different runs to compare, got one of them twice")
    found = [read_student(place) for place in places]
    rows = shared_rows([figures for figures, _ in found])
    labels = _labels([figures for figures, _ in found], places)
    return [
        Student(label, redacted(place), pictures, _only(figures, own), len(figures.prompts))
        for label, place, (figures, pictures), own in zip(labels, places, found, rows, strict=True)
    ]


def _labels(several: Sequence[Figures], places: Sequence[str]) -> list[str]:
    """The recipes' names, with as much more as tells them apart."""
    choices = (
        [each.recipe for each in several],
        [f"{each.recipe}, {each.student}" for each in several],
        [f"{each.recipe}, {redacted(place)}" for each, place in zip(several, places, strict=True)],
    )
    return next(labels for labels in choices if len(set(labels)) == len(labels))


def _only(figures: Figures, rows: Sequence[int]) -> Figures:
    """The figures of some of the prompts, in this order."""

    def of_method(method: MethodFigures) -> MethodFigures:
        chosen = {name: [c[row] for row in rows] for name, c in method.by_prompt.items()}
        columns = {name: chosen.pop(name) for name in method.columns}
        whole = method.whole if len(rows) == len(figures.prompts) else {}
        return method.model_copy(update={**chosen, "columns": columns, "whole": whole})

    def of_other(other: OtherFigures) -> OtherFigures:
        chosen = {name: [values[row] for row in rows] for name, values in other.columns.items()}
        whole = other.whole if len(rows) == len(figures.prompts) else {}
        files = [other.files[row] for row in rows]
        return other.model_copy(update={"columns": chosen, "whole": whole, "files": files})

    return figures.model_copy(
        update={
            "categories": None
            if figures.categories is None
            else [figures.categories[row] for row in rows],
            "others": [of_other(other) for other in figures.others],
            "prompts": [figures.prompts[row] for row in rows],
            "noise": [figures.noise[row] for row in rows],
            "methods": [of_method(method) for method in figures.methods],
        }
    )


def pairs(students: Sequence[Student]) -> list[Pair]:
    """Every student with every one after it."""
    return [_pair(*two) for two in itertools.combinations(students, 2)]


def _pair(first: Student, second: Student) -> Pair:
    errors = zip(second.method.error, first.method.error, strict=True)
    wins = [error < other for error, other in errors]
    found = over(second.figures, first.figures)
    return Pair(first.label, second.label, found, sum(wins) / len(wins))


def other_rows(students: Sequence[Student]) -> list[OtherRow]:
    """Other people's models of all evaluations, each once."""
    rows: dict[str, OtherRow] = {}
    for student in students:
        figures = student.figures
        for other in figures.others:
            if other.identity in rows:
                continue
            columns = other.measured
            reference, few_steps = figures.methods[0].measured, figures.methods[-2].measured
            rows[other.identity] = OtherRow(
                label=other.name,
                nfe=other.nfe,
                same_noise=other.same_noise,
                student=student.label,
                figures=figures_of_other([reference, few_steps, columns]),
                student_over=figures_over_other(
                    by_prompt(student.method.measured), by_prompt(columns)
                ),
            )
    return list(rows.values())


def prompt_rows(students: Sequence[Student]) -> list[PromptRow]:
    """Every prompt; first those on which the students differ most."""
    errors = torch.tensor([student.method.error for student in students], dtype=torch.float64)
    columns = psnr_of_error(errors).T.tolist()
    rows = [
        PromptRow(prompt, tuple(values))
        for prompt, values in zip(students[0].figures.prompts, columns, strict=True)
    ]
    return [rows[number] for number in _most_different(students)]


def _most_different(students: Sequence[Student]) -> list[int]:
    """Numbers of the prompts, by the largest error's ratio to the smallest."""
    errors = torch.tensor([student.method.error for student in students], dtype=torch.float64)
    ratio = errors.max(0).values.div(errors.min(0).values.clamp(min=1e-12))
    return [int(number) for number in ratio.argsort(descending=True, stable=True)]


def sheet(students: Sequence[Student]) -> bytes | None:
    """The reference's and every student's pictures of the prompts that tell them apart, as JPEG.

    None: some of the files aren't there any more.

    Raises:
        ValueError: a file isn't a picture, or its name leads elsewhere.
    """
    numbers, frames = _most_different(students)[:SHEET_PROMPTS], students[0].figures.frames
    reference = students[0].figures.methods[0]
    columns = [(students[0].pictures, reference), *((one.pictures, one.method) for one in students)]
    try:
        rows = [
            torch.stack(
                [_picture(folder, method.files[number], frames) for folder, method in columns]
            )
            for number in numbers
        ]
    except FileNotFoundError:
        return None
    prompts = [students[0].figures.prompts[number] for number in numbers]
    labels = [reference.name, *(student.label for student in students)]
    return jpeg_bytes(grid(rows, prompts, labels))


def _picture(folder: str, name: str, frames: int) -> torch.Tensor:
    """A picture, or a few frames of a video side by side."""
    place = storage.join(folder, relative_name(name, where=redacted(folder)))
    if frames == 1:
        return read_picture(place)
    picture = read_picture(place, _VIDEO_PIXELS)
    if picture.shape[-2] % frames:
        raise ValueError(
            f"{redacted(place)} has {picture.shape[-2]} rows, which aren't {frames} frames one "
            "below the other: evaluate again"
        )
    return strip(picture, frames)


def page(students: Sequence[Student], created: str) -> str:
    """The whole comparison as one HTML document that needs nothing beside it.

    Args:
        created: date and time, as it shall be read.
    """
    jpeg, compared = sheet(students), pairs(students)
    curves = {student.label: student.figures.curve for student in students}
    others = other_rows(students)
    has_curves = any(len(points) > 1 for points in curves.values())
    return rendered(
        "comparison.html.j2",
        students=students,
        figures=figure_table([student.measured for student in students]),
        others=others,
        other_figures=figure_table([other.figures for other in others]),
        other_differences=figure_table([other.student_over for other in others]),
        pairs=compared,
        differences=figure_table([pair.figures for pair in compared]),
        charts=curve_charts(curves, teacher=False) if has_curves else [],
        curves={label: curve_table(points) for label, points in curves.items() if len(points) > 1},
        prompts=prompt_rows(students),
        shown=min(SHEET_PROMPTS, len(students[0].figures.prompts)),
        created=created,
        picture=None if jpeg is None else inline_jpeg(jpeg),
    )
