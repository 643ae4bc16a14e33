"""A progress bar in the driver's terminal for a loop that runs in remote workers.

worker rank 0 --update()--> ProgressBoard (actor) <--read()-- driver thread --> terminal
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_POLL_SECONDS = 0.5


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the newest step and its text."""

    def __init__(self) -> None:
        self.latest: tuple[int, str] = (0, "starting workers")

    def update(self, step: int, text: str) -> None:
        self.latest = (step, text)

    def read(self) -> tuple[int, str]:
        return self.latest


@contextmanager
def progress_bar(title: str, total: int, *, show: bool) -> Iterator[Any]:
    """Show a bar over `total` steps while the block runs; yields the board for the workers."""
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        disable=not show,
    )
    done = threading.Event()

    def poll() -> None:
        while not done.wait(_POLL_SECONDS):
            step, text = ray.get(board.read.remote())
            bar.update(task, completed=step, text=text)

    with bar:
        task = bar.add_task(title, total=total, text="starting workers")
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield board
        finally:
            done.set()
            thread.join()
            step, text = ray.get(board.read.remote())
            bar.update(task, completed=step, text=text)
