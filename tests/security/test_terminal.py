"""What others wrote reaches the terminal as letters: no styles, pictures or control characters."""

from __future__ import annotations

import ast
import io
import logging
from pathlib import Path

import pytest
from rich.table import Table

import piflow
from piflow.cli import escape_logs
from piflow.progress import PlainConsole, progress
from tests.unit.evaluation.test_comparison import kept
from tests.unit.evaluation.test_figures import made
from tests.unit.test_cli import run_main

HOSTILE = "[/x] [bold]a[/bold] :skull: \x1b[2J\x1b]0;title\x07\r\x9b31m\u202e"
SHOWN = r"[/x] [bold]a[/bold] :skull: \x1b[2J\x1b]0;title\x07\r\x9b31m\u202e"
PRODUCT = Path(piflow.__file__).parent


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_table_shows_what_is_in_its_cells(is_terminal: bool) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=100, force_terminal=is_terminal, color_system=None)
    table = Table(title=f"title {HOSTILE}")
    table.add_column(f"column {HOSTILE}")
    table.add_row(f"cell {HOSTILE}")
    console.print(table)
    console.print(f"line {HOSTILE}\nanother", soft_wrap=True)
    told = file.getvalue()
    for part in ("title", "column", "cell", "line"):
        assert f"{part} {SHOWN}" in told
    assert f"line {SHOWN}\nanother\n" in told
    assert not set("\x07\r\x9b\u202e") & set(told) and "\x1b[2J" not in told


def test_a_log_of_progress_shows_what_it_counts() -> None:
    file = io.StringIO()
    with progress(HOSTILE, 1, console=PlainConsole(file=file)) as bar:
        bar.advance()
    assert file.getvalue() == f"{SHOWN} 1/1 (100 %)\n"


def test_warnings_in_the_log_are_escaped_with_their_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow's errors hold what the server said, and are logged with what they came from."""
    handler = logging._StderrHandler(logging.WARNING)  # type: ignore[attr-defined]
    monkeypatch.setattr(logging, "lastResort", handler)
    escape_logs()
    log = logging.Logger("of nobody who has a handler")
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        log.warning("not delivered: %s", HOSTILE, exc_info=error)
    told = capsys.readouterr().err
    assert told.startswith(f"not delivered: {SHOWN}\nTraceback (most recent call last):\n")
    assert told.endswith(f"ValueError: {SHOWN}\n")
    assert not set("\x1b\x07\r\x9b") & set(told)


def test_names_in_somebodys_evaluation_are_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [kept(tmp_path / "a", made(recipe=HOSTILE)), kept(tmp_path / "b", made(recipe="b"))]
    out = str(tmp_path / "page.html")
    monkeypatch.setenv("COLUMNS", "250")
    assert run_main("compare", *places, "--out", out, monkeypatch=monkeypatch) == 0
    told = capsys.readouterr().out
    assert f"b over {SHOWN}" in told and not set("\x1b\x07") & set(told)


def test_no_other_console_is_made() -> None:
    """Of rich's the product imports `Table` alone, which holds strings that our console draws."""
    found = []
    for path in sorted(PRODUCT.rglob("*.py")):
        name = path.relative_to(PRODUCT)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                found += [f"{name}: {node.module}.{part.name}" for part in node.names]
            if isinstance(node, ast.Import):
                found += [f"{name}: {p.name}" for p in node.names if p.name.startswith("rich")]
    others = {text for text in found if not text.endswith("rich.table.Table")}
    assert {text.partition(":")[0] for text in others} == {"progress.py"}, others
