"""The report in a real browser: what it lets people do, and what it lets nobody's text do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from piflow.evaluation.compare import MethodResult, PromptResult
from piflow.evaluation.curve import CurvePoint
from piflow.evaluation.metrics import Interval
from piflow.evaluation.report import (
    EvaluationReport,
    Lineage,
    ShownPicture,
    ShownPrompt,
    render_html,
)
from piflow.evaluation.sheet import page_picture

CHROMIUM = "/usr/bin/chromium"
EVIL = '<script>window.broken = 1</script>" onload="window.broken = 1'
PROMPTS = ("red heart", EVIL, "blue cat", "green cat")
METHODS = ("teacher, 32 Euler steps", "student, 2 NFE", "student, 4 NFE")


def report() -> EvaluationReport:
    methods = [
        MethodResult(
            name, 4, {"error": 20.0, "diversity": 0.5}, {"diversity": 1.0}, 1.0, 0.1,
            name.startswith("student"), "2 NFE" not in name,
        )
        for name in METHODS
    ]  # fmt: skip
    shown = [
        ShownPrompt(
            prompt, len(PROMPTS) - number, "cats" if "cat" in prompt else "", 20.0, 21.0 + number,
            tuple(
                ShownPicture(
                    name, f"pictures/{number}.png",
                    *page_picture(Image.new("RGB", (300, 300), (60 * number, 80 * at, 90)), 1e6),
                )
                for at, name in enumerate(METHODS)
            ),
        )
        for number, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    figure = Interval(1.0, 0.5, 1.5)
    figures = {"psnr_db": figure, "psnr_gain_db": figure, "diversity_ratio": figure}
    curve = [
        CurvePoint(nfe, f"student, {nfe} NFE", "teacher", figures, over, figures, 0.5, 1.0)
        for nfe, over in ((2, {"psnr_over_champion_db": figure}), (4, {}))
    ]
    return EvaluationReport(
        title="a report", created="2025-01-02 03:04 UTC", prompts=4, seeds=2, batch_size=8,
        methods=tuple(methods), figures=figures, curve=curve, others=(),
        categories={"cats": figures, EVIL: figures}, cautions=(EVIL,),
        metrics={"psnr": "version 1"}, lineage=Lineage("run", "r", "m", EVIL, {"torch": "2"}),
        shown=tuple(shown),
        prompt_results=tuple(PromptResult(p, 20.0, 21.0 + n) for n, p in enumerate(PROMPTS)),
        prompt_categories=tuple(prompt.category for prompt in shown), recipe_yaml=f"name: {EVIL}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as library:
        # root, as in a container, has no sandbox of Chromium
        yield library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_html(report()))
    return f"file://{path}"


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, place: str) -> Iterator[Page]:
    """The page in a colour scheme; nothing may reach its console or the network."""
    context = browser.new_context(color_scheme=request.param)
    opened = context.new_page()
    told: list[str] = []
    opened.on("console", lambda message: told.append(message.text))
    opened.on("pageerror", lambda error: told.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith("data:") or told.append(asked.url))
    opened.goto(place)
    yield opened
    assert told == [place] and opened.evaluate("window.broken") is None
    context.close()


def headings(page: Page) -> list[str]:
    return page.locator("article:visible h3").all_inner_texts()


def test_nothing_hinders_a_screen_reader(page: Page) -> None:
    """By axe-core's rules, before and inside the enlargement."""
    assert Axe().run(page).violations_count == 0
    page.locator("button.picture").first.click()
    assert Axe().run(page).violations_count == 0


def test_filter_category_order_and_columns(page: Page) -> None:
    assert headings(page) == list(PROMPTS), "worst first"
    page.get_by_label("Order").select_option("best")
    assert headings(page) == list(PROMPTS[::-1])
    page.get_by_label("Filter").fill("CAT")
    assert headings(page) == ["green cat", "blue cat"]
    expect(page.get_by_role("status")).to_have_text("2 of 4 prompts with pictures, 2 of 4 in all")
    assert page.locator("table.prompts tbody tr:visible").count() == 2
    page.get_by_label("Filter").fill("")
    page.locator("#category").select_option("")
    assert headings(page) == [EVIL, "red heart"]
    page.locator("#category").select_option("*")
    captions = page.locator("article").first.locator("figure:visible")
    assert captions.count() == 2, "points of the curve are asked for"
    page.get_by_label("student, 2 NFE", exact=True).check()
    assert captions.count() == 3


def views(page: Page) -> list[str]:
    """How each pane shows its picture."""
    return page.locator("#panes img").evaluate_all("all => all.map(each => each.style.transform)")


def test_all_panes_show_one_part_by_keyboard_and_mouse(page: Page) -> None:
    button = page.locator("article").nth(1).locator("button.picture").last
    page.locator("article").nth(1).locator("button.picture:visible").last.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#zoom-title")).to_have_text(EVIL)
    assert len(set(views(page))) == 1
    page.keyboard.press("+")
    page.keyboard.press("+")
    expect(page.locator("#scale")).to_have_text("225 %")
    before = views(page)
    assert len(before) == 2 and len(set(before)) == 1
    page.keyboard.press("ArrowRight")
    moved = views(page)
    assert len(set(moved)) == 1 and moved != before
    frame = page.locator(".frame").first.bounding_box()
    assert frame is not None
    page.mouse.move(frame["x"] + 20, frame["y"] + 20)
    page.mouse.wheel(0, -400)
    page.wait_for_function("document.querySelector('#scale').textContent !== '225 %'")
    scale = float(views(page)[0].partition("scale(")[2].rstrip(")"))
    assert scale == pytest.approx(2.25 * math.e, rel=1e-3) and len(set(views(page))) == 1
    held = views(page)
    page.mouse.down()
    page.mouse.move(frame["x"] + 60, frame["y"] + 50)
    page.mouse.up()
    assert views(page) != held and len(set(views(page))) == 1
    page.keyboard.press("0")
    expect(page.locator("#scale")).to_have_text("100 %")
    page.keyboard.press("n")
    expect(page.locator("#zoom-title")).to_have_text("blue cat")
    page.keyboard.press("p")
    page.keyboard.press("Escape")
    expect(page.locator("#zoom")).to_be_hidden()
    assert button.evaluate("each => each === document.activeElement"), "focus is back"


def test_without_scripts_and_on_paper_everything_is_there(browser: Any, place: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(place)
    assert headings(page) == list(PROMPTS)
    assert page.locator("form.controls").is_hidden() and page.locator("#zoom").is_hidden()
    assert page.locator("article img:visible").count() == len(PROMPTS) * len(METHODS)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("table.prompts tr:visible").count() == 1 + len(PROMPTS)
    context.close()
    printed = browser.new_page()
    printed.goto(place)
    printed.emulate_media(media="print", color_scheme="dark")
    assert printed.locator("form.controls").is_hidden()
    paper = "getComputedStyle(document.body).backgroundColor"
    assert printed.evaluate(paper) == "rgb(255, 255, 255)", "no dark paper"
    printed.close()


def test_text_of_a_prompt_runs_nothing_even_where_escaping_fails(
    browser: Any, tmp_path: Path
) -> None:
    """The page's own policy is a second wall."""
    broken = render_html(report()).replace(
        "red heart</h3>", f"{EVIL}<img src=x onerror='window.broken = 1'></h3>"
    )
    assert "<script>window.broken" in broken
    path = tmp_path / "broken.html"
    path.write_text(broken)
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.goto(f"file://{path}")
    assert page.evaluate("window.broken") is None
    assert any("Content Security Policy" in text for text in told)
    page.close()
