"""Servers that never finish an answer: one limit of time for a whole question."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_Answer = TypeVar("_Answer")


def answered_within(seconds: float | None, question: Callable[[], _Answer], whose: str) -> _Answer:
    """What `question` returns or raises, if it does so in time.

    Clients of HTTP limit how long they wait for the next byte, so a server that sends one now and
    then keeps them waiting without end. The question is asked in a thread of its own. One that is
    late is left to itself: the thread ends with the process.

    Args:
        seconds: None: as long as it takes.
        whose: names the server in the error.

    Raises:
        TimeoutError: there is no whole answer yet.
    """
    answers: list[_Answer] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="question", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(
            f"{whose} listens, but gave no whole answer in time (within {seconds:g} s): it is "
            "overloaded, or something else is at its address"
        )
    return answers[0]
