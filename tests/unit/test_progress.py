"""A log file gets a line every 30 s or 5 %, and a terminal a bar."""

from __future__ import annotations

import io
import re

from rich.console import Console

from piflow.progress import Lines, progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, updates: list[tuple[float, int, str]]) -> list[str]:
    """What is written for (seconds, done, text)."""
    written: list[str] = []
    clock = Clock()
    lines = Lines("run: steps", total, written.append, clock)
    for clock.now, done, text in updates:
        lines.update(done, text)
    lines.finish()
    return written


def test_a_line_for_every_twentieth_part() -> None:
    steps = [(2.0 * step, step, f"loss {step}") for step in range(101)]
    written = lines_of(100, steps)
    assert len(written) == 20
    assert written[0] == "run: steps 5/100 (5 %), loss 5, 3:10 left"
    assert written[-1] == "run: steps 100/100 (100 %), loss 100"


def test_a_line_every_thirty_seconds_of_a_slow_stage() -> None:
    steps = [(10.0 * step, step, "") for step in range(31)]
    written = lines_of(100_000, steps)
    assert [line.split(",")[0] for line in written] == [
        f"run: steps {done}/100000 (0 %)" for done in range(3, 31, 3)
    ]
    assert written[0].endswith(", 277:46:10 left")


def test_a_stage_that_stands_still_says_so() -> None:
    waiting = [(10.0 * number, 0, "starting workers") for number in range(8)]
    assert lines_of(10, waiting) == ["run: steps 0/10 (0 %), starting workers"] * 2


def test_a_resumed_stage_counts_its_own_speed() -> None:
    steps = [(float(number), 50 + number, "") for number in range(11)]
    written = lines_of(100, steps)
    assert written[0] == "run: steps 55/100 (55 %), 0:45 left"
    assert len(written) == 2


def test_a_stage_of_moments_writes_few_lines() -> None:
    steps = [(0.009 * number, number, "") for number in range(101)]
    assert lines_of(100, steps) == ["run: steps 100/100 (100 %)"]
    assert lines_of(8, [(0.0, 8, "")]) == ["run: steps 8/8 (100 %)"]


def test_a_log_file_has_lines_and_no_control_characters() -> None:
    file = io.StringIO()
    with progress("[red]x[/red]: pictures", 3, console=Console(file=file, width=20)) as bar:
        bar.advance(2)
        bar.advance(1, "a text far longer than the console is wide")
    assert file.getvalue() == (
        "[red]x[/red]: pictures 3/3 (100 %), a text far longer than the console is wide\n"
    )


def test_a_terminal_has_a_bar() -> None:
    file = io.StringIO()
    with progress("x", 3, console=Console(file=file, force_terminal=True, width=80)) as bar:
        bar.update(2, "loss 1 [x]")
        bar.advance(1, "loss 1 [x]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "3/3" in text and "loss 1 [x]" in text


def test_quiet_means_nothing() -> None:
    file = io.StringIO()
    for console, show in ((Console(file=file), False), (Console(file=file, quiet=True), True)):
        with progress("x", 3, show=show, console=console) as bar:
            bar.update(1)
            bar.advance(2)
    assert file.getvalue() == ""
