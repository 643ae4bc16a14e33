"""The evaluation report: one HTML file that needs nothing beside it.

Style and the sheet of pictures are inline, there is no script and no address is fetched, so the
file can be mailed, archived with the run or opened from MLflow's artifact view. Links lead to the
pictures in full size, in the folder beside it. Every value is escaped.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

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
    psnr_gain: Interval  # dB, student over the teacher at as many steps
    diversity_ratio: Interval  # student over the reference
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
    return rendered("report.html.j2", report=report, picture=inline_jpeg(report.grid_jpeg))


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
    environment.filters.update(
        db=_decibels, signed_db=_signed_decibels, share=_share, ratio=_ratio, seconds=_seconds
    )
    return environment.get_template(template).render(**values)


def _decibels(value: float | None) -> str:
    return "–" if value is None else _number(value, "{:.2f}")


def _signed_decibels(value: float) -> str:
    return _number(value, "{:+.2f}")


def _share(value: float | None) -> str:
    return "–" if value is None else _number(100 * value, "{:.1f} %")


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
