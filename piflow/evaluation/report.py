"""The evaluation report: one HTML file that needs nothing beside it.

Style, script and pictures are inline and no address is fetched, so the file can be mailed, archived
with the run or opened from MLflow's artifact view. Links lead to the pictures in full size, in the
folder beside it. Every value is escaped, and the page's own policy lets it run this one script and
load nothing: a prompt that got through would be text still. Without scripts everything is there but
filter, order and zoom.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from piflow.config.metrics import COLUMNS, FIGURES, METRICS, has_interval
from piflow.evaluation.chart import Chart, Series, chart
from piflow.evaluation.compare import MethodResult, OtherResult, PromptResult
from piflow.evaluation.curve import CurvePoint, charted
from piflow.evaluation.metrics import Interval
from piflow.storage.foreign import redacted

_JPEG_MAGIC = b"\xff\xd8\xff"
_PACKAGE, _TEMPLATES = "piflow.evaluation", "templates"
_SMALL = 256  # pixels


@dataclass(frozen=True)
class Lineage:
    """Where the numbers come from, from prompts to checkpoint."""

    run_id: str
    recipe_hash: str
    manifest_hash: str
    student: str  # "step 3000", or an adapter's URI
    versions: dict[str, str]  # package -> version


@dataclass(frozen=True)
class ShownPicture:
    """A picture in the page.

    Attributes:
        path: of its file in full size, from the report's folder.
        data: URI that holds it.
        width, height: pixels, as it is in the page.
    """

    method: str
    path: str
    data: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """Whether it is shown enlarged, and its pixels had better be seen."""
        return max(self.width, self.height) < _SMALL


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt with its pictures, one of each method.

    Attributes:
        number: among the evaluation's.
        category: "" : it has none.
    """

    prompt: str
    number: int
    category: str
    psnr_teacher: float
    psnr_student: float
    pictures: tuple[ShownPicture, ...]


@dataclass(frozen=True)
class PromptRow:
    """A prompt in the table of all."""

    prompt: str
    category: str
    psnr_teacher: float
    psnr_student: float

    @property
    def gain(self) -> float:
        return self.psnr_student - self.psnr_teacher


@dataclass(frozen=True)
class EvaluationReport:
    """Everything the report shows."""

    title: str
    created: str  # date and time, as it shall be read
    prompts: int
    seeds: int  # pictures a prompt
    batch_size: int  # pictures drawn at once
    methods: tuple[MethodResult, ...]  # the reference first, the student last
    figures: Mapping[str, Interval]  # the student's, by name
    curve: Sequence[CurvePoint]  # over the number of network evaluations
    others: Sequence[OtherResult]  # other people's models
    categories: Mapping[str, Mapping[str, Interval]]  # the student's figures on each
    cautions: Sequence[str]  # of numbers that the student wasn't trained for
    metrics: Mapping[str, str]  # what decides each metric, in words
    lineage: Lineage
    shown: tuple[ShownPrompt, ...]  # the student's smallest gain first
    prompt_results: tuple[PromptResult, ...]
    prompt_categories: tuple[str, ...] | None  # of each; None: there are none
    recipe_yaml: str  # the resolved recipe

    @property
    def columns_shown(self) -> list[MethodResult]:
        """The methods whose pictures are shown, in the order of a prompt's."""
        names = [picture.method for picture in self.shown[0].pictures] if self.shown else []
        return [method for method in self.methods if method.name in names]


def render_html(report: EvaluationReport) -> str:
    """The report as one HTML document.

    Raises:
        ValueError: there is no method to show.
    """
    if not report.methods:
        raise ValueError("a report needs at least one method, got none; run the samplers first")
    headings, rows = headline(report.methods)
    return rendered(
        "report.html.j2",
        report=report,
        headings=headings,
        rows=rows,
        columns=[COLUMNS[name] for name in _columns(report.methods)],
        figures=figure_rows(report.figures),
        curve=curve_table(report.curve) if len(report.curve) > 1 else None,
        charts=curve_charts({"student": report.curve}, teacher=True)
        if len(report.curve) > 1
        else [],
        metrics=[(name, METRICS[name].licence, text) for name, text in report.metrics.items()],
        category_figures=figure_table(list(report.categories.values())),
        others=[other_row(other) for other in report.others],
        other_figures=figure_table([other.figures for other in report.others]),
        other_differences=figure_table([other.student_over for other in report.others]),
        columns_shown=report.columns_shown,
        other_noise=[other.name for other in report.others if not other.same_noise],
        prompt_rows=_prompt_rows(report),
        categories=list(dict.fromkeys(report.prompt_categories or ())),
        script=_source("report.js"),
    )


def _prompt_rows(report: EvaluationReport) -> list[PromptRow]:
    """All prompts, those with the student's smallest gain first."""
    categories = report.prompt_categories or ("",) * len(report.prompt_results)
    rows = [
        PromptRow(each.prompt, category, each.psnr_teacher, each.psnr_student)
        for each, category in zip(report.prompt_results, categories, strict=True)
    ]
    return [rows[number] for number in by_gain(report.prompt_results)]


def by_gain(results: Sequence[PromptResult]) -> list[int]:
    """Numbers of the prompts, the student's smallest gain over the teacher first.

    Where both are perfect there is none, and the prompt counts as 0 dB.
    """

    def gain(number: int) -> float:
        found = results[number].psnr_student - results[number].psnr_teacher
        return 0.0 if math.isnan(found) else found

    return sorted(range(len(results)), key=gain)


def worst_and_best(results: Sequence[PromptResult], each: int) -> list[int]:
    """Numbers of as many prompts from both ends of `by_gain`, in that order."""
    ordered = by_gain(results)
    return ordered if len(ordered) <= 2 * each else ordered[:each] + ordered[-each:]


def headline(methods: Sequence[MethodResult]) -> tuple[list[str], list[list[str]]]:
    """The methods as a table: headings, and a row of texts each."""
    names = _columns(methods)
    headings = ["method", "NFE"]
    for name in names:
        headings.append(COLUMNS[name].heading)
        if COLUMNS[name].kind == "ratio":
            headings.append(f"{COLUMNS[name].heading} ratio")
    rows = []
    for method in methods:
        row = [method.name, str(method.nfe)]
        for name in names:
            row.append(_cell(name, method, is_reference=method is methods[0]))
            if COLUMNS[name].kind == "ratio":
                row.append(_ratio(method.ratios[name]) if name in method.ratios else "–")
        rows.append([*row, _seconds(method.seconds), _plain(method.seconds_a_picture)])
    return [*headings, "seconds", "s/picture"], rows


def _columns(methods: Sequence[MethodResult]) -> list[str]:
    return [name for name in COLUMNS if any(name in method.values for method in methods)]


def _cell(name: str, method: MethodResult, *, is_reference: bool) -> str:
    if name in method.values:
        return _FORMS[COLUMNS[name].form](method.values[name])
    return "reference" if is_reference else "–"


def figure_rows(figures: Mapping[str, Interval]) -> list[tuple[str, str, str, str]]:
    """Name, value, interval and meaning of each figure, as texts."""
    return [
        (name, *figure_texts(name, figure), FIGURES[name].meaning)
        for name, figure in figures.items()
    ]


def figure_texts(name: str, figure: Interval) -> tuple[str, str]:
    """A figure's value, and its interval; "" for one of all pictures."""
    spec = FIGURES[name]
    column = COLUMNS[spec.column]
    if spec.over is None:
        form = _FORMS[column.form]
    else:
        form = {"error": _signed_decibels, "ratio": _ratio}.get(column.kind, _signed)
    if not has_interval(name):
        return form(figure.value), ""
    return form(figure.value), f"{form(figure.low)} to {form(figure.high)}"


def curve_table(
    points: Sequence[CurvePoint],
) -> tuple[list[str], list[tuple[int, bool, list[tuple[str, str]]]]]:
    """A student's curve of two points or more: headings, and a row a point.

    A row is its NFE, whether the student was trained for it, and the cells: value and interval.
    """
    names = charted(points)
    gains = [name for name in points[0].figures if FIGURES[name].over == "few_steps"]
    trained = next((point for point in points if not point.over_trained), points[-1])
    others = [point for point in points if point is not trained]
    over = [name for name in others[0].over_trained if all(name in p.over_trained for p in others)]
    headings = [
        *names,
        *gains,
        *(f"{_short(name)} over {trained.nfe} NFE" for name in over),
        "s/picture",
        "teacher's s/picture",
    ]
    rows = []
    for point in points:
        cells = [figure_texts(name, point.figures[name]) for name in (*names, *gains)]
        for name in over:
            found = point.over_trained.get(name)
            cells.append(("–", "") if found is None else figure_texts(name, found))
        for seconds in (point.seconds, point.teacher_seconds):
            cells.append(("–" if seconds is None else _plain(seconds), ""))
        rows.append((point.nfe, point is trained, cells))
    return headings, rows


def _short(name: str) -> str:
    """A figure over a champion without its end, since here it is over something else."""
    return name.replace("_over_champion", "")


def curve_charts(curves: Mapping[str, Sequence[CurvePoint]], *, teacher: bool) -> list[Chart]:
    """A chart for every figure that all curves have, and one of the seconds.

    Args:
        curves: by label.
        teacher: whether the first curve's teacher has a line as well.
    """
    points = [point for each in curves.values() for point in each]

    def lines(of: Callable[[CurvePoint, bool], Interval | None]) -> list[Series]:
        series = [
            Series(label, [(p.nfe, value) for p in each if (value := of(p, False)) is not None])
            for label, each in curves.items()
        ]
        if teacher:
            first = next(iter(curves.values()))
            own = [(p.nfe, value) for p in first if (value := of(p, True)) is not None]
            series.append(Series("teacher in as many Euler steps", own, is_dashed=True))
        return series

    def figure(name: str) -> Callable[[CurvePoint, bool], Interval | None]:
        return lambda point, is_teacher: (
            point.teacher_figures if is_teacher else point.figures
        ).get(name)

    def seconds(point: CurvePoint, is_teacher: bool) -> Interval | None:
        value = point.teacher_seconds if is_teacher else point.seconds
        return None if value is None else Interval(value, value, value)

    drawn = [
        chart(FIGURES[name].meaning, "network evaluations", lines(figure(name)))
        for name in charted(points)
    ]
    drawn.append(chart("seconds a picture", "network evaluations", lines(seconds)))
    return [each for each in drawn if each is not None]


def other_row(other: OtherResult) -> tuple[str, str, int]:
    """Name, what it is, and steps of somebody else's model."""
    config = other.config
    parts = [redacted(config.base)]
    if config.lora is not None:
        parts.append(f"with {redacted(config.lora)} × {config.strength:g}")
    parts.append(f"in {config.dtype}")
    if not other.same_noise:
        parts.append("from other noise")
    return other.name, ", ".join(parts), config.steps


def figure_table(
    several: Sequence[Mapping[str, Interval]],
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Name, meaning and (value, interval) of each column of figures; "–" where there is none."""
    names = [name for name in FIGURES if any(name in figures for figures in several)]
    return [
        (
            name,
            FIGURES[name].meaning,
            [
                figure_texts(name, figures[name]) if name in figures else ("–", "")
                for figures in several
            ],
        )
        for name in names
    ]


def inline_jpeg(content: bytes) -> str:
    """A JPEG file's bytes as a page holds them.

    Raises:
        ValueError: it is no JPEG file.
    """
    if not content.startswith(_JPEG_MAGIC):
        raise ValueError(
            f"expected a JPEG file's bytes, got {content[:8]!r}...; make it with "
            "piflow.evaluation.sheet.jpeg_bytes"
        )
    return base64.b64encode(content).decode("ascii")


def rendered(template: str, **values: object) -> str:
    """A page of this package's templates, every value escaped."""
    environment = Environment(
        loader=PackageLoader(_PACKAGE, _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(db=_decibels, signed_db=_signed_decibels, share=_share, ratio=_ratio)
    style = _source("style.css")
    script = values.get("script")
    policy = content_policy(str(style), None if script is None else str(script))
    return environment.get_template(template).render(style=style, policy=policy, **values)


def content_policy(style: str, script: str | None) -> str:
    """What a page may load and run: its own style and script, by their hashes, and its pictures."""
    run = f"script-src {_hash_source(script)}; " if script is not None else ""
    return (
        f"default-src 'none'; {run}style-src {_hash_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash_source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _source(name: str) -> Markup:
    """A file of the templates' folder, which is ours and stands in a page as it is."""
    return Markup((files(_PACKAGE) / _TEMPLATES / name).read_text(encoding="utf-8"))


def _decibels(value: float) -> str:
    return _number(value, "{:.2f}")


def _signed_decibels(value: float) -> str:
    return _number(value, "{:+.2f}")


def _signed(value: float) -> str:
    return _number(value, "{:+.4g}")


def _plain(value: float) -> str:
    return _number(value, "{:.4g}")


def _share(value: float) -> str:
    return _number(100 * value, "{:.1f} %")


def _ratio(value: float) -> str:
    return _number(value, "{:.3f}")


def _seconds(value: float) -> str:
    return _number(value, "{:.1f}")


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return form.format(value).replace("-", "−")


_FORMS: dict[str, Callable[[float], str]] = {
    "db": _decibels,
    "ratio": _ratio,
    "share": _share,
    "number": _plain,
}
