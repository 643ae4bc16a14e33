"""Measure the few-step student against its teacher, by the pictures of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from piflow.config import OtherStudentConfig
from piflow.config.metrics import ALWAYS, COLUMNS
from piflow.evaluation.curve import CurvePoint, Sampled, curve
from piflow.evaluation.drawing import Drawing, Drawn, Method
from piflow.evaluation.intervals import (
    Columns,
    by_prompt,
    figures_of_other,
    figures_over_other,
    own_figures,
    summary,
)
from piflow.evaluation.measures import Material, Retrieve, measured
from piflow.evaluation.metrics import Interval, psnr_of_error
from piflow.evaluation.networks import Instruments


@dataclass(frozen=True)
class MethodResult:
    """One row of the headline table: a sampler on all evaluation prompts and seeds.

    Attributes:
        name: such as "teacher, 32 Euler steps".
        nfe: as of `Method`.
        values: by column, each in one number; the reference has no PSNR.
        ratios: over the reference, of the columns that are read so.
        seconds, seconds_a_picture: as of `Drawn`.
        is_student, is_headline: as of `Method`.
        is_other: whether it is somebody else's model.
    """

    name: str
    nfe: int
    values: Mapping[str, float]
    ratios: Mapping[str, float]
    seconds: float
    seconds_a_picture: float
    is_student: bool
    is_headline: bool = True
    is_other: bool = False


@dataclass(frozen=True)
class OtherResult:
    """Somebody else's model.

    Attributes:
        identity: as of `Other`.
        figures: its own, as a student's; none over its teacher.
        student_over: the student's over it, prompt by prompt, under the names that they have over a
            champion.
    """

    name: str
    config: OtherStudentConfig
    identity: str
    same_noise: bool
    figures: dict[str, Interval]
    student_over: dict[str, Interval]


@dataclass(frozen=True)
class PromptResult:
    """One prompt's PSNR in dB against the reference, of its pictures' mean squared error."""

    prompt: str
    psnr_teacher: float  # at the student's number of steps
    psnr_student: float


@dataclass(frozen=True)
class Evaluation:
    """Everything measured.

    Attributes:
        noise: hash of each prompt's noise.
        metrics: what decides each metric that was measured, in words.
        columns: ``(P,)`` or ``()`` float64 by method and column.
        figures: the student's, by name.
        categories: of each prompt; None: they have none.
        by_category: the student's figures on each category's prompts, of those with two or more.
        curve: student and teacher over the number of network evaluations.
        others: other people's models, whose rows are among the methods'.
        pictures: (prompts, seeds, 3, H, W) in [-1, 1] by method name.
        files: name of each prompt's first picture in the pictures' folder, by method name.
    """

    prompts: tuple[str, ...]
    noise: tuple[str, ...]
    methods: tuple[MethodResult, ...]  # reference first, student last
    metrics: dict[str, str]
    columns: dict[str, dict[str, Tensor]]
    figures: dict[str, Interval]
    curve: tuple[CurvePoint, ...]
    others: tuple[OtherResult, ...]
    per_prompt: tuple[PromptResult, ...]
    pictures: Mapping[str, Tensor]
    files: dict[str, tuple[str, ...]]
    categories: tuple[str, ...] | None = None
    by_category: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)

    @property
    def psnr_gain(self) -> Interval:
        """The student's endpoint PSNR over the teacher's in as many steps, dB."""
        return self.figures["psnr_gain_db"]

    @property
    def diversity_ratio(self) -> Interval:
        """The student's diversity over the reference's."""
        return self.figures["diversity_ratio"]


def measure(
    drawing: Drawing,
    metrics: Sequence[str] = ALWAYS,
    *,
    retrieve: Retrieve | None = None,
    instruments: Instruments | None = None,
    categories: tuple[str, ...] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """All figures of pictures that are drawn.

    Args:
        metrics: names of those to measure; `ALWAYS` among them.
        retrieve: finds the emoji nearest to each picture, for retrieval@1.
        instruments: networks and references that the metrics need.
        categories: of each prompt.
        advance: told how many more pictures a network has seen.

    Raises:
        FileNotFoundError: pictures are missing.
        ValueError: a network doesn't load, or a reference can't be used.
    """
    drawn, pictures = drawing.read()
    other_noise = [method.name for method in drawing.methods if not method.same_noise]
    material = Material(drawing.prompts, pictures, retrieve, instruments, advance, other_noise)
    columns = measured(metrics, material)
    names = [method.name for method in drawing.methods]
    student, few_steps = columns[names[-1]]["error"], columns[names[-2]]["error"]
    methods = _methods(drawing.methods, drawn, columns)
    return Evaluation(
        prompts=drawing.prompts,
        noise=drawing.noise,
        methods=methods,
        metrics=material.identities(metrics),
        columns=columns,
        figures=own_figures([columns[name] for name in names]),
        curve=curve(
            [
                Sampled(
                    method.name,
                    method.nfe,
                    method.is_student,
                    method.seconds_a_picture,
                    columns[method.name],
                )
                for method in methods
                if not method.is_other
            ]
        ),
        others=_others(drawing.methods, columns),
        per_prompt=tuple(
            PromptResult(prompt, float(teacher_psnr), float(student_psnr))
            for prompt, teacher_psnr, student_psnr in zip(
                drawing.prompts, psnr_of_error(few_steps), psnr_of_error(student), strict=True
            )
        ),
        pictures=pictures,
        files={name: item.files for name, item in drawn.items()},
        categories=categories,
        by_category={}
        if categories is None
        else _by_category([columns[name] for name in names], categories),
    )


def _by_category(
    methods: Sequence[Columns], categories: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    found = {}
    for category in dict.fromkeys(categories):
        rows = [row for row, each in enumerate(categories) if each == category]
        if len(rows) > 1:
            some = [
                {name: values[rows] for name, values in by_prompt(columns).items()}
                for columns in methods
            ]
            found[category] = own_figures(some)
    return found


def _others(
    methods: Sequence[Method], columns: dict[str, dict[str, Tensor]]
) -> tuple[OtherResult, ...]:
    reference, few_steps, student = (columns[methods[at].name] for at in (0, -2, -1))
    found = []
    for method in methods:
        if method.other is not None:
            own = columns[method.name]
            found.append(
                OtherResult(
                    name=method.name,
                    config=method.other.config,
                    identity=method.other.identity,
                    same_noise=method.same_noise,
                    figures=figures_of_other([reference, few_steps, own]),
                    student_over=figures_over_other(by_prompt(student), by_prompt(own)),
                )
            )
    return tuple(found)


def _methods(
    methods: Sequence[Method], drawn: dict[str, Drawn], columns: dict[str, dict[str, Tensor]]
) -> tuple[MethodResult, ...]:
    """The headline table; the reference is its first row."""
    reference = columns[methods[0].name]
    rows = []
    for method in methods:
        own = columns[method.name]
        rows.append(
            MethodResult(
                name=method.name,
                nfe=method.nfe,
                values={
                    name: summary(name, values)
                    for name, values in own.items()
                    if method is not methods[0] or COLUMNS[name].kind != "error"
                },
                ratios={
                    name: float(values.mean() / reference[name].mean())
                    for name, values in own.items()
                    if COLUMNS[name].kind == "ratio"
                },
                seconds=drawn[method.name].seconds,
                seconds_a_picture=drawn[method.name].seconds_a_picture,
                is_student=method.is_student,
                is_headline=method.is_headline,
                is_other=method.other is not None,
            )
        )
    return tuple(rows)
