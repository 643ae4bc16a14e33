"""How far a long stage is: a bar in a terminal, a line now and then in a log file.

    emoji-flux: steps 96/320 (30 %), loss 0.0213, 5.1 samples/s, 5:48 left

A line is due after 30 s, or after 5 % if that is sooner, and at the end. All stages use this one
helper, so that a log reads the same whatever wrote it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from piflow.storage.foreign import shown

_LINE_SECONDS = 30.0
_LINE_SHARE = 0.05  # of the whole
_SHORTEST_GAP = 1.0  # seconds between two lines of a stage that is over at once
_REMEMBERED = 20  # points that the time left follows from
_LINE_LENGTH = 4000  # characters of a text's line that a terminal gets


class PlainConsole(Console):
    """A terminal that gets every text as it was written: the one way to print tables.

    rich would take ``[bold]`` in a file's name for a style, ``[/x]`` for an error and ``:key:`` for
    a picture, and pass control characters on. Here they are letters, and control characters are
    escaped as `shown` does.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as rich draws it; strings in tables and titles come here, too."""
        lines = (shown(line, _LINE_LENGTH) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)


class Progress(Protocol):
    """What a loop tells of itself."""

    def update(self, done: int, text: str = "") -> None:
        """So much is done; `text` says what else is known ("loss 0.02, 5 samples/s")."""

    def advance(self, count: int = 1, text: str = "") -> None:
        """So much more is done."""


class Lines:
    """Progress as lines of text.

    Args:
        title: what is counted, such as "emoji-flux: pictures".
        total: how many there are.
        write: takes a line.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        title: str,
        total: int,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total = title, total
        self._write, self._clock = write, clock
        self._points: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)
        self._done = 0
        self._text = ""
        self._told: tuple[float, int] = (clock(), 0)  # when, and how much was done
        self._written: int | None = None  # how much was done at the last line

    def update(self, done: int, text: str = "") -> None:
        now = self._clock()
        if not self._points:
            self._told = (self._told[0], done)  # a resumed stage doesn't start with a jump
        if not self._points or done != self._points[-1][1]:
            self._points.append((now, done))
        self._done, self._text = done, text
        waited, moved = now - self._told[0], done - self._told[1]
        if waited >= _LINE_SECONDS or (
            moved >= max(1, _LINE_SHARE * self._total) and waited >= _SHORTEST_GAP
        ):
            self._tell(now)

    def advance(self, count: int = 1, text: str = "") -> None:
        self.update(self._done + count, text)

    def finish(self) -> None:
        """The last line, unless it was written."""
        if self._points and self._written != self._done:
            self._tell(self._clock())

    def _tell(self, now: float) -> None:
        self._told, self._written = (now, self._done), self._done
        share = f" ({100 * self._done // self._total} %)" if self._total else ""
        parts = [f"{self._title} {self._done}/{self._total}{share}", self._text, self._left()]
        self._write(", ".join(part for part in parts if part))

    def _left(self) -> str:
        (began, first), (now, last) = self._points[0], self._points[-1]
        if last <= first or now <= began or last >= self._total:
            return ""
        seconds = round((self._total - last) * (now - began) / (last - first))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
        return f"{clock} left"


class _Bar:
    """Progress as a bar of rich's."""

    def __init__(self, bar: Bar, title: str, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, text="")

    def update(self, done: int, text: str = "") -> None:
        self._bar.update(self._task, completed=done, text=text)

    def advance(self, count: int = 1, text: str = "") -> None:
        self._bar.update(self._task, advance=count, text=text)


class _Silent:
    def update(self, done: int, text: str = "") -> None:
        pass

    def advance(self, count: int = 1, text: str = "") -> None:
        pass


@contextmanager
def progress(
    title: str, total: int, *, show: bool = True, console: Console | None = None
) -> Iterator[Progress]:
    """Shows how far a stage is while the block runs, on stderr.

    Args:
        title: what is counted, such as "emoji-flux: pictures".
        total: how many there are.
        show: False: nothing is written.
        console: another than stderr's.
    """
    console = console or PlainConsole(stderr=True)
    if not show or console.quiet:
        yield _Silent()
        return
    if not console.is_terminal:
        lines = Lines(title, total, lambda line: _print(console, line))
        try:
            yield lines
        finally:
            lines.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Bar(*columns, console=console) as bar:
        yield _Bar(bar, title, total)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.file.flush()
