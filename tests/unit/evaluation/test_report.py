"""The report is one well-formed file that shows what it was given, and nothing it wasn't."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from piflow.evaluation import sheet
from piflow.evaluation.chart import ticks
from piflow.evaluation.compare import MethodResult, PromptResult
from piflow.evaluation.curve import CurvePoint
from piflow.evaluation.metrics import Interval
from piflow.evaluation.report import (
    EvaluationReport,
    Lineage,
    ShownPicture,
    ShownPrompt,
    render_html,
    worst_and_best,
)

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """Checks nesting and collects tables (rows of cell texts), attributes and other text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self._table = dict(attrs)["class"] or ""
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> does not close the innermost element"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self._table][-1][-1] += " ".join(data.split())


def method(
    name: str,
    nfe: int,
    psnr: float | None,
    diversity: float,
    ratio: float,
    retrieval: float | None,
    seconds: float,
) -> MethodResult:
    values = {"error": psnr, "diversity": diversity, "retrieval": retrieval}
    measured = {column: value for column, value in values.items() if value is not None}
    is_student = name == "student"
    return MethodResult(name, nfe, measured, {"diversity": ratio}, seconds, 0.25, is_student)


@pytest.fixture
def report() -> EvaluationReport:
    picture = sheet.page_picture(Image.new("RGB", (8, 8)), 1e6)
    shown = ShownPicture("student", "pictures/0001-red-1.png", *picture)
    return EvaluationReport(
        title="emoji-flux",
        created="2025-01-02 03:04 UTC",
        prompts=64,
        seeds=4,
        batch_size=64,
        methods=(
            method("teacher, 32 Euler steps", 32, None, 0.412, 1.0, 0.83, 40.25),
            method("teacher, 8 Euler steps", 8, 29.9, 0.4, 0.971, 0.8, 10.0),
            method("teacher, 4 Euler steps", 4, 23.8, 0.37, 0.898, None, 5.0),
            method("student", 4, 28.25, 0.39, 0.947, 0.8125, 5.5),
        ),
        figures={
            "psnr_gain_db": Interval(4.45, -0.5, 4.8),
            "diversity_ratio": Interval(0.947, 0.9, float("inf")),
        },
        curve=(),
        others=(),
        categories={},
        cautions=(),
        metrics={"psnr": "version 1", "diversity": "version 1"},
        lineage=Lineage("run-1", "recipe-2", "manifest-3", "step 350", {"torch": "2", "ray": "3"}),
        shown=(ShownPrompt("red heart", 0, "", 23.0, 27.0, (shown,)),),
        prompt_categories=None,
        prompt_results=(PromptResult("red heart", 23.0, 27.0), PromptResult("cat", 24.0, 29.0)),
        recipe_yaml="name: emoji\ntraining:\n  lr: 0.0001\n",
    )


def _parse(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_tables_hold_the_figures(report: EvaluationReport) -> None:
    page = _parse(render_html(report))
    assert page.tables["headline"][1:] == [
        ["teacher, 32 Euler steps", "32", "reference", "0.412", "1.000", "83.0 %", "40.2", "0.25"],
        ["teacher, 8 Euler steps", "8", "29.90", "0.400", "0.971", "80.0 %", "10.0", "0.25"],
        ["teacher, 4 Euler steps", "4", "23.80", "0.370", "0.898", "–", "5.0", "0.25"],
        ["student", "4", "28.25", "0.390", "0.947", "81.2 %", "5.5", "0.25"],
    ]
    assert page.tables["prompts"][1:] == [
        ["red heart", "23.00", "27.00", "+4.00"],
        ["cat", "24.00", "29.00", "+5.00"],
    ]
    assert page.tables["lineage"] == [
        ["MLflow run", "run-1"],
        ["recipe hash", "recipe-2"],
        ["store manifest hash", "manifest-3"],
        ["student", "step 350"],
        ["versions", "torch 2, ray 3"],
        ["metric psnr", "version 1; Apache-2.0"],
        ["metric diversity", "version 1; Apache-2.0"],
    ]
    assert [row[:3] for row in page.tables["student-figures"][1:]] == [
        ["psnr_gain_db", "+4.45", "−0.50 to +4.80"],
        ["diversity_ratio", "0.947", "0.900 to ∞"],
    ]
    text = " ".join(page.text.split())
    assert "+4.45 dB 95 % interval −0.50 to +4.80 dB" in text
    assert "0.947 95 % interval 0.900 to ∞" in text
    assert "name: emoji\ntraining:\n  lr: 0.0001\n" in page.text


def point(nfe: int, psnr: float, is_trained: bool = False) -> CurvePoint:
    figures = {
        "psnr_db": Interval(psnr, psnr - 1, psnr + 1),
        "psnr_gain_db": Interval(3.0, 2.0, 4.0),
        "diversity_ratio": Interval(0.9, 0.8, 1.0),
    }
    over = {} if is_trained else {"psnr_over_champion_db": Interval(-2.0, -2.5, -1.5)}
    teacher = figures | {"psnr_db": Interval(psnr - 3, psnr - 4, psnr - 2)}
    return CurvePoint(
        nfe, f"student, {nfe} NFE", f"teacher, {nfe}", figures, over, teacher, 0.5, None
    )


def test_a_curve_is_a_table_and_a_chart_a_figure(report: EvaluationReport) -> None:
    curve = (point(2, 20.0), point(4, 28.0, True), point(8, math.inf))
    html = render_html(dataclasses.replace(report, curve=curve, cautions=("runs <b>badly",)))
    page = _parse(html)
    assert page.tables["curve"] == [
        [
            "NFE",
            "psnr_db",
            "diversity_ratio",
            "psnr_gain_db",
            "psnr_db over 4 NFE",
            "s/picture",
            "teacher's s/picture",
        ],
        ["2", "20.00", "0.900", "+3.00", "−2.00", "0.5", "–"],
        ["4", "28.00", "0.900", "+3.00", "–", "0.5", "–"],
        ["8", "∞", "0.900", "+3.00", "−2.00", "0.5", "–"],
    ]
    assert "<small>19.00 to 21.00</small>" in html and "<small>−2.50 to −1.50</small>" in html
    lines = [value for tag, name, value in page.attributes if (tag, name) == ("polyline", "points")]
    assert [len(line.split()) for line in lines] == [2, 2, 3, 3, 3], "PSNR, ratio, seconds"
    heights = [float(mark.split(",")[1]) for mark in lines[0].split()]
    assert heights[0] > heights[1], "28 dB stand above 20 dB"
    assert "Careful: runs &lt;b&gt;badly." in html
    assert "curve" not in _parse(render_html(dataclasses.replace(report, curve=curve[1:2]))).tables


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (19.2, 29.1, [18, 20, 22, 24, 26, 28, 30]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
        (2.0, 2.0, [1.8, 1.9, 2, 2.1, 2.2]),
        (0.0, 0.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_nothing_is_fetched(report: EvaluationReport) -> None:
    """One script and one style, whose hashes are all that the page's own policy allows."""
    html = render_html(report)
    page = _parse(html)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert links[1:] == ["./pictures/0001-red-1.png"], "a link that a reader may follow"
    assert links[0].startswith("data:image/png;base64,")
    tags = [tag for tag, _, _ in page.attributes]
    assert not {"link", "iframe"} & set(tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    for forbidden in ("http://", "https://", "url(", "@import"):
        assert forbidden not in html
    (policy,) = [
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")
        if value.startswith("default-src")
    ]  # fmt: skip
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "img-src data:;" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("gains", "each", "expected"),
    [
        ([3.0, 1.0, 2.0], 2, [1, 2, 0]),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 2, [1, 2, 4, 3]),
        ([1.0, -math.inf, math.nan, math.inf], 1, [1, 3]),
        ([], 2, []),
    ],
)
def test_the_worst_prompts_come_first(gains: list[float], each: int, expected: list[int]) -> None:
    results = [PromptResult(str(number), 0.0, gain) for number, gain in enumerate(gains)]
    assert worst_and_best(results, each) == expected


def test_small_pictures_are_exact_and_large_ones_smaller() -> None:
    small = Image.effect_noise((200, 100), 50).convert("RGB")
    data, width, height = sheet.page_picture(small, 10)
    content = io.BytesIO(base64.b64decode(data.partition(",")[2]))
    assert (width, height) == (200, 100)
    assert Image.open(content).convert("RGB").tobytes() == small.tobytes()
    data, width, height = sheet.page_picture(small.resize((1000, 500)), 20_000)
    assert data.startswith("data:image/jpeg") and (width, height) == (200, 100)


def test_light_and_dark(report: EvaluationReport) -> None:
    assert "prefers-color-scheme: dark" in render_html(report)


def test_every_value_is_escaped(report: EvaluationReport) -> None:
    evil = "<script>alert('x')</script>\" onload=\"y"
    picture = report.shown[0].pictures[0]
    shown = tuple(
        dataclasses.replace(picture, method=evil, path=path)
        for path in (evil, "javascript:alert(1)")
    )
    poisoned = dataclasses.replace(
        report,
        title=evil,
        created=evil,
        shown=(ShownPrompt(evil, 0, evil, 1.0, 2.0, shown),),
        prompt_categories=(evil,),
        recipe_yaml=evil,
        methods=(dataclasses.replace(report.methods[0], name=evil),),
        prompt_results=(PromptResult(evil, 1.0, 2.0),),
        lineage=Lineage(evil, evil, evil, 1, {evil: evil}),
    )
    html = render_html(poisoned)
    assert html.count("<script") == 1
    page = _parse(html)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tables["prompts"][1][0] == evil
    assert ("img", "alt", f"{evil}: {evil}") in page.attributes
    assert ("option", "value", evil) in page.attributes
    links = [value for _, name, value in page.attributes if name == "href"]
    assert len(links) == 2 and all(link.startswith("./") for link in links)


def test_refuses_an_empty_report(report: EvaluationReport) -> None:
    with pytest.raises(ValueError, match="at least one method"):
        render_html(dataclasses.replace(report, methods=()))
