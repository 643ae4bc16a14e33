"""The evaluation report: one HTML file that needs nothing beside it.

Style and the sheet of pictures are inline, there is no script and no address is fetched, so the
file can be mailed, archived with the run or opened from MLflow's artifact view. Links lead to the
pictures in full size, in the folder beside it. Every value is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from piflow.config.metrics import COLUMNS, FIGURES, METRICS, has_interval
from piflow.evaluation.compare import MethodResult, PromptResult
from piflow.evaluation.metrics import Interval

_JPEG_MAGIC = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Lineage:
    """Where the numbers come from, from prompts to checkpoint."""

    run_id: str
    recipe_hash: str
    manifest_hash: str
    student: str  # "step 3000", or an adapter's URI
    versions: dict[str, str]  # package -> version


@dataclass(frozen=True)
class PictureLinks:
    """A prompt's pictures in full size: (method, path from the report's folder)."""

    prompt: str
    pictures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EvaluationReport:
    """Everything the report shows."""

    title: str
    created: str  # date and time, as it shall be read
    prompts: int
    seeds: int  # pictures a prompt
    methods: tuple[MethodResult, ...]  # the reference first, the student last
    figures: Mapping[str, Interval]  # the student's, by name
    metrics: Mapping[str, str]  # what decides each metric, in words
    lineage: Lineage
    grid_jpeg: bytes
    grid_caption: str
    picture_links: tuple[PictureLinks, ...]
    prompt_results: tuple[PromptResult, ...]
    recipe_yaml: str  # the resolved recipe


def render_html(report: EvaluationReport) -> str:
    """The report as one HTML document.

    Raises:
        ValueError: there is no method to show, or ``grid_jpeg`` is no JPEG file.
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
        metrics=[(name, METRICS[name].licence, text) for name, text in report.metrics.items()],
        picture=inline_jpeg(report.grid_jpeg),
    )


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
        rows.append([*row, _seconds(method.seconds)])
    return [*headings, "seconds"], rows


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
        loader=PackageLoader("piflow.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(db=_decibels, signed_db=_signed_decibels, share=_share, ratio=_ratio)
    return environment.get_template(template).render(**values)


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
