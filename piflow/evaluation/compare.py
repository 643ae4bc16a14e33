"""Measure the few-step student against its teacher, by the pictures of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from piflow.config.metrics import ALWAYS, COLUMNS
from piflow.evaluation.curve import CurvePoint, Sampled, curve
from piflow.evaluation.drawing import Drawing, Drawn, Method
from piflow.evaluation.intervals import own_figures, summary
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
    """

    name: str
    nfe: int
    values: Mapping[str, float]
    ratios: Mapping[str, float]
    seconds: float
    seconds_a_picture: float
    is_student: bool
    is_headline: bool = True


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
        curve: student and teacher over the number of network evaluations.
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
    per_prompt: tuple[PromptResult, ...]
    pictures: Mapping[str, Tensor]
    files: dict[str, tuple[str, ...]]

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
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """All figures of pictures that are drawn.

    Args:
        metrics: names of those to measure; `ALWAYS` among them.
        retrieve: finds the emoji nearest to each picture, for retrieval@1.
        instruments: networks and references that the metrics need.
        advance: told how many more pictures a network has seen.

    Raises:
        FileNotFoundError: pictures are missing.
        ValueError: a network doesn't load, or a reference can't be used.
    """
    drawn, pictures = drawing.read()
    material = Material(drawing.prompts, pictures, retrieve, instruments, advance)
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
            ]
        ),
        per_prompt=tuple(
            PromptResult(prompt, float(teacher_psnr), float(student_psnr))
            for prompt, teacher_psnr, student_psnr in zip(
                drawing.prompts, psnr_of_error(few_steps), psnr_of_error(student), strict=True
            )
        ),
        pictures=pictures,
        files={name: item.files for name, item in drawn.items()},
    )


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
            )
        )
    return tuple(rows)
