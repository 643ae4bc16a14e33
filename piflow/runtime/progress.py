"""Progress in the driver's terminal or log of a loop that runs in remote workers.

worker rank 0 --update()--> Mailbox (actor) <--read()-- driver thread --> terminal
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from piflow.progress import progress
from piflow.runtime.environment import without_secrets
from piflow.runtime.mailbox import start_mailbox

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 2.0


@contextmanager
def mailbox_with_bar(
    title: str, total: int, *, show: bool, run: str | None = None
) -> Iterator[Any]:
    """A new mailbox, and the progress over `total`, as it has it, while the block runs.

    Args:
        run: name of the training run; None: it is another job.
    """
    mailbox = start_mailbox(run, total)
    done = threading.Event()
    with progress(title, total, show=show) as bar:

        def show_latest() -> None:
            try:
                logs = ray.get(mailbox.take_logs.remote(), timeout=_ANSWER_SECONDS)
                latest = ray.get(mailbox.read.remote(), timeout=_ANSWER_SECONDS)
            except ray.exceptions.RayError:  # the driver's own loop finds out what is wrong
                return
            for log in logs:
                print(without_secrets(log, os.environ), flush=True)
            bar.update(*latest)

        def poll() -> None:
            while not done.wait(_POLL_SECONDS):
                show_latest()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield mailbox
        finally:
            done.set()
            thread.join()
            show_latest()
