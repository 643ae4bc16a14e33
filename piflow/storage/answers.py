"""Servers that never finish an answer: one limit of time for a whole question."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from piflow.storage.foreign import redacted

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


def knock(address: str, connect_seconds: float, seconds: float) -> None:
    """Make sure that an object store of one's own which is there answers a request, without keys.

    pyarrow's clients wait without end for a store that sends a byte now and then, in C++, where
    nothing can end it: not even the process ends before the request does.

    Args:
        address: ``http://host:port``

    Raises:
        TimeoutError: it doesn't. Whatever else is wrong, the client says better.
    """
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def question() -> None:
        connection = kind(parts.netloc, timeout=connect_seconds)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("HEAD", "/")
            connection.getresponse()

    if not getproxies():  # the store is reached in another way then
        answered_within(seconds, question, f"the object store {redacted(address)}")
