"""Several students on one page: on what they share, pair by pair, and nothing that isn't so."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from piflow.evaluation import comparison
from piflow.evaluation.comparison import (
    SHEET_PROMPTS,
    page,
    pairs,
    prompt_rows,
    read_student,
    read_students,
    sheet,
)
from piflow.evaluation.figures import Figures, over
from tests.unit.evaluation.test_figures import made, with_networks
from tests.unit.evaluation.test_report import _parse
from tests.unit.test_cli import run_main

PSNR = "psnr_over_champion_db"


def with_error(figures: Figures, *factors: float) -> Figures:
    """The student's errors multiplied, prompt by prompt."""
    student = figures.student_figures
    error = [value * factor for value, factor in zip(student.error, factors, strict=True)]
    methods = [*figures.methods[:-1], student.model_copy(update={"error": error})]
    return figures.model_copy(update={"methods": methods})


def kept(folder: Path, figures: Figures, colour: int = 0, step: int = 2) -> str:
    """An evaluated run; the picture of row r has r as its red level and `colour` as its green."""
    evaluation = folder / "evaluation"
    (evaluation / "figures").mkdir(parents=True, exist_ok=True)
    (evaluation / "figures" / f"step_{step:08d}.json").write_text(figures.model_dump_json())
    (evaluation / "pictures").mkdir(exist_ok=True)
    for row, prompt in enumerate(figures.prompts):
        number = int(prompt.split()[-1])
        image = Image.new("RGB", (64, 64), (10 * number, colour, 0))
        image.save(evaluation / "pictures" / f"{row}.png")
    return str(folder)


def test_students_are_compared_on_the_prompts_that_all_share(tmp_path: Path) -> None:
    first, second = made(prompts=6), made(prompts=6, first=2, better=2.0, recipe="other")
    third = made(prompts=4, first=3, better=0.5, recipe="third")
    places = [
        kept(tmp_path / str(number), figures)
        for number, figures in enumerate((first, second, third))
    ]
    students = read_students(places)
    assert [student.label for student in students] == ["tiny", "other", "third"]
    assert [student.prompts for student in students] == [6, 6, 4]
    for student in students:
        assert student.figures.prompts == ["prompt 3", "prompt 4", "prompt 5"]
    found = {(pair.first, pair.second): pair for pair in pairs(students)}
    assert found.keys() == {("tiny", "other"), ("tiny", "third"), ("other", "third")}
    better = found["tiny", "other"]
    assert (better.figures[PSNR].low, better.figures[PSNR].high) == pytest.approx(
        (3.0103, 3.0103), abs=1e-4
    )
    assert better.wins == 1.0 and found["other", "third"].wins == 0.0
    assert found["other", "third"].figures[PSNR].value == pytest.approx(-6.0206, abs=1e-4)
    assert over(students[1].figures, students[0].figures) == better.figures


def test_the_page_says_what_was_measured_and_needs_nothing_else(tmp_path: Path) -> None:
    places = [
        kept(tmp_path / "a", made(prompts=6)),
        kept(tmp_path / "b", with_error(made(prompts=6, student="step 4"), 1, 2, 1, 1, 4, 0.5)),
    ]
    students = read_students(places)
    html = page(students, "2025-01-02 03:04 UTC")
    parsed = _parse(html)
    text = " ".join(parsed.text.split())
    first, second = students
    assert (first.label, second.label) == ("tiny, step 2", "tiny, step 4")
    measured = second.measured["psnr_db"]
    assert f"{measured.value:.2f} {measured.low:.2f} to {measured.high:.2f}" in text
    (pair,) = pairs(students)
    gain = pair.figures[PSNR]
    value, low, high = gain.value, gain.low, gain.high
    told = f"{value:+.2f} {low:+.2f} to {high:+.2f}".replace("-", "−")
    assert f"tiny, step 4 over tiny, step 2 {told}" in text
    assert pair.wins == 1 / 6 and "16.7 %" in text
    names = [row[0] for row in parsed.tables["prompts"][1:]]
    assert names[:3] == ["prompt 4", "prompt 1", "prompt 5"], "largest differences first"
    assert [row.prompt for row in prompt_rows(students)] == names
    assert all(place in text for place in places)
    assert "data:image/jpeg;base64," in html and "prefers-color-scheme: dark" in html
    for outside in ("http://", "https://", "<script", "<link", 'src="/', "@import", "href"):
        assert outside not in html, outside


def test_figures_of_networks_stand_beside_the_others(tmp_path: Path) -> None:
    """Those of all pictures only where all prompts are compared."""
    first = with_networks(made(prompts=6))
    second = with_networks(made(prompts=6, recipe="other"), more=1.5)
    places = [kept(tmp_path / "a", first), kept(tmp_path / "b", second)]
    tables = _parse(page(read_students(places), "now")).tables
    column = tables["students"][0].index("fd_dinov2_teacher")
    assert [row[column] for row in tables["students"][1:]] == ["12.5", "12.5"]
    column = tables["pairs"][0].index("clip_score_over_champion")
    assert tables["pairs"][1][column].split() == ["+1.5"]
    some = kept(tmp_path / "c", with_networks(made(prompts=5, recipe="third")))
    headings = _parse(page(read_students([places[1], some]), "now")).tables["students"][0]
    assert "clip_score" in headings and "fd_dinov2_teacher" in headings
    rows = _parse(page(read_students([places[1], some]), "now")).tables["students"][1:]
    column = headings.index("fd_dinov2_teacher")
    assert [row[column] for row in rows] == ["–", "12.5"], "five of the first one's six prompts"


def test_curves_of_several_students_share_a_chart(tmp_path: Path) -> None:
    """Of the prompts that all share; a student without a curve is a point of it."""
    figures = made(prompts=6)
    reference, teacher, student = figures.methods
    more = [
        teacher.model_copy(update={"name": "teacher, 2 Euler steps", "nfe": 2}),
        student.model_copy(update={"name": "student, 2 NFE", "nfe": 2, "is_student": True}),
    ]
    several = figures.model_copy(update={"methods": [reference, *more, teacher, student]})
    others = made(prompts=5, recipe="other", better=2.0)
    students = read_students([kept(tmp_path / "a", several), kept(tmp_path / "b", others)])
    assert [point.nfe for point in students[0].figures.curve] == [2, 4]
    assert students[0].figures.curve[1].figures == students[0].measured
    parsed = _parse(page(students, "now"))
    lines = [v for tag, name, v in parsed.attributes if (tag, name) == ("polyline", "points")]
    assert [len(line.split()) for line in lines] == [2, 1] * 3, "PSNR, ratio and retrieval"
    assert [row[0] for row in parsed.tables["curve"][1:]] == ["2", "4"]
    assert "Over the number" not in page(
        read_students([kept(tmp_path / "c", figures)] + [kept(tmp_path / "d", others)]), "now"
    )


def test_pictures_of_one_prompt_stand_in_one_row(tmp_path: Path) -> None:
    """Rows of other runs are other rows of the file, and what differs most comes first."""
    factors = [1.0] * 9 + [8.0]
    places = [
        kept(tmp_path / "a", made(prompts=12), colour=50),
        kept(tmp_path / "b", with_error(made(prompts=10, first=2), *factors), colour=200),
    ]
    content = sheet(read_students(places))
    assert content is not None
    levels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    rows: list[list[tuple[int, int]]] = []
    cell = 256 + 4  # pictures are enlarged to 256 pixels, with gaps between
    left = levels.shape[1] - 3 * cell
    top = levels.shape[0] - SHEET_PROMPTS * cell
    for row in range(SHEET_PROMPTS):
        middle = top + row * cell + 128
        rows.append([tuple(levels[middle, left + column * cell + 128][:2]) for column in range(3)])
    for row in rows:
        reds, greens = zip(*row, strict=True)
        assert max(reds) - min(reds) <= 3, "one prompt"
        assert np.abs(np.subtract(greens, (50, 50, 200))).max() <= 3, "reference, first, second"
    assert round(rows[0][0][0] / 10) == 11, "the one with eight times the error"


def test_videos_are_shown_as_a_few_frames_side_by_side(tmp_path: Path) -> None:
    """Files of 64 rows, which hold 4 frames of 16."""

    def of_frames(count: str) -> bytes | None:
        told = made(prompts=2, reference={"model.frames": count})
        return sheet(read_students([kept(tmp_path / count / name, told) for name in "ab"]))

    def size(content: bytes | None) -> tuple[int, int]:
        assert content is not None
        return Image.open(io.BytesIO(content)).size

    pictures, videos = size(of_frames("1")), size(of_frames("4"))
    assert (pictures[1] - videos[1]) == 2 * (256 - 16), "rows of 16 pixels and not of 256"
    with pytest.raises(ValueError, match="64 rows, which aren't 5 frames one below the other"):
        of_frames("5")
    assert size(of_frames("x")) == pictures


def test_pictures_that_are_gone_and_names_that_lead_elsewhere(tmp_path: Path) -> None:
    figures = made()
    places = [kept(tmp_path / "a", figures), kept(tmp_path / "b", made(recipe="other"))]
    (tmp_path / "b" / "evaluation" / "pictures" / "3.png").unlink()
    students = read_students(places)
    assert sheet(students) is None
    assert "no longer where they were drawn" in page(students, "now")
    student = figures.student_figures.model_copy(update={"files": ["../../a.png"] * 6})
    wrong = figures.model_copy(update={"methods": [*figures.methods[:-1], student]})
    students = read_students([kept(tmp_path / "a", wrong), places[1]])
    with pytest.raises(ValueError, match=r"names the file '\.\./\.\./a\.png'"):
        page(students, "now")


def test_every_value_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\" onload=\"y"
    prompts = [f"{evil} {number}" for number in range(6)]
    figures = made(recipe=evil, student=evil).model_copy(update={"prompts": prompts})
    places = [
        kept(tmp_path / "a", figures),
        kept(tmp_path / "b", figures.model_copy(update={"recipe": "other"})),
    ]
    html = page(read_students(places), evil)
    assert "<script" not in html
    parsed = _parse(html)
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.tables["prompts"][1][0].startswith(evil)


def test_a_run_is_its_newest_figures_and_files_can_be_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept(run, made(student="step 2"))
    kept(run, made(student="step 10"), step=10)
    for place, student in (
        (run, "step 10"),
        (run / "evaluation", "step 10"),
        (run / "evaluation" / "figures" / "step_00000002.json", "step 2"),
    ):
        figures, pictures = read_student(str(place))
        assert figures.student == student
        assert Path(pictures).samefile(run / "evaluation" / "pictures")
    both = [str(run), str(run / "evaluation" / "figures" / "step_00000002.json")]
    assert [student.label for student in read_students(both)] == ["tiny, step 10", "tiny, step 2"]
    same = [kept(tmp_path / name, made()) for name in ("a", "b")]
    labels = [student.label for student in read_students(same)]
    assert labels == [f"tiny, {place}" for place in same]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 6}, "have 0 prompts in common and none from the same noise: evaluate them"),
        ({"noise": [f"{row:016x}" for row in range(50, 56)]}, "have 6 prompts in common and none"),
        ({"reference": {"guidance.scale": "9"}}, "other references .guidance.scale: 3.5 and 9"),
    ],
)
def test_what_cant_be_compared_is_one_line_and_exit_code_1(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = [kept(tmp_path / "a", made()), kept(tmp_path / "b", made(**changes))]
    out = tmp_path / "page.html"
    assert run_main("compare", *places, "--out", str(out), monkeypatch=monkeypatch) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(message, told) and "tiny (step 2) and tiny (step 2)" in told
    assert not out.exists()


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [kept(tmp_path / "a", made()), kept(tmp_path / "b", made(recipe="b", better=2.0))]
    out = tmp_path / "page.html"
    assert run_main("compare", *places, "--out", str(out), monkeypatch=monkeypatch) == 0
    assert "+3.01" in capsys.readouterr().out and "+3.01" in out.read_text()
    for arguments, told in (
        (places[:1], "expected 2 to 12 runs to compare, got 1"),
        ([places[0]] * 2, "got one of them twice"),
        ([places[0], str(tmp_path)], "no figures at"),
    ):
        assert run_main("compare", *arguments, "--out", str(out), monkeypatch=monkeypatch) == 1
        assert told in " ".join(capsys.readouterr().err.split())
    assert comparison.MOST == 12
