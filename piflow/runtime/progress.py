"""A progress bar in the driver's terminal for a loop that runs in remote workers.

worker rank 0 --update()--> Mailbox (actor) <--read()-- driver thread --> terminal
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

from piflow.runtime.mailbox import start_mailbox

_POLL_SECONDS = 0.5


@contextmanager
def mailbox_with_bar(name: str, total: int, *, show: bool) -> Iterator[Any]:
    """A new mailbox, and a bar over `total` steps, as it has them, while the block runs."""
    mailbox = start_mailbox()
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
            step, text = ray.get(mailbox.read.remote())
            bar.update(task, completed=step, text=text)

    with bar:
        task = bar.add_task(f"{name}: steps", total=total, text="starting workers")
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield mailbox
        finally:
            done.set()
            thread.join()
            step, text = ray.get(mailbox.read.remote())
            bar.update(task, completed=step, text=text)
