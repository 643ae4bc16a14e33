"""SIGTERM, SIGHUP and Ctrl-C in the driver."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAME_SECONDS = 1.0  # `timeout` and a closing terminal send theirs twice


class StoppedError(BaseException):
    """A signal ended the command before it was done; the same command goes on.

    It isn't an `Exception`: a signal arrives in the middle of any library's code, which mustn't
    take it for a failure of its own.

    Args:
        number: of the signal.
        state: what is saved.
    """

    def __init__(self, number: int, state: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}: {state}. The same command goes on")
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal ends the block by a StoppedError, so that whatever is open is closed.

    Raises:
        StoppedError: from wherever the main thread is; what a second signal interrupts is the
            closing.
    """
    received: list[float] = []

    def handle(number: int, frame: object) -> None:
        _leave_closed_terminal(number)
        if received and _is_no_second(number, received[0]):
            return
        received.append(time.monotonic())
        raise StoppedError(number, "what was finished before stays")

    with _handled_by(handle):
        yield


class Signals:
    """Signals while workers are at work: at the first they save and stop, not at the second.

    Args:
        saving: what they do at the first one, for people.
        unsaved: what is lost at the second.
    """

    def __init__(
        self,
        saving: str = "save after this step and stop",
        unsaved: str = "steps since the last checkpoint are lost",
    ) -> None:
        self.unsaved = unsaved
        self._saving = saving
        self.number: int | None = None
        self._received = 0.0
        self._cause = ""
        self._noticed = False  # nobody has sent it
        self._told = False

    @contextmanager
    def handled(self) -> Iterator[Signals]:
        """Signals come here while the block runs."""
        with _handled_by(self._handle):
            yield self

    def machine_leaves(self) -> None:
        """The driver's machine is about to be taken away: as if SIGTERM had come.

        Whoever takes it may send SIGTERM as well, which then is the first signal.
        """
        if self.number is None:
            self.number, self._noticed = signal.SIGTERM, True
            self._cause = "this machine is about to be taken away (Ray drains it)"

    def pass_on(self, ask_to_stop: Callable[[], bool], needs: Callable[[], str]) -> None:
        """Ask the workers to stop, if there was a signal; again and again, whoever forgets it.

        Args:
            ask_to_stop: returns whether there are workers.
            needs: how long a save takes, for people.

        Raises:
            StoppedError: there are none yet.
        """
        if self.number is None:
            return
        if not ask_to_stop() and not self._told:
            raise StoppedError(self.number, "no worker was at work, nothing is lost")
        if not self._told:
            self._told = True
            again = "a signal" if self._noticed else "once more"
            print(
                f"{self._cause}: the workers {self._saving}{needs()}; {again} ends them at once",
                flush=True,
            )

    def _handle(self, number: int, frame: object) -> None:
        _leave_closed_terminal(number)
        if self.number is None or self._noticed:
            self.number, self._received, self._noticed = number, time.monotonic(), False
            self._cause = signal.Signals(number).name
        elif not _is_no_second(number, self._received):
            raise StoppedError(number, self.unsaved)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Whatever handles SIGTERM does so after the block as well, which a library takes it from.

    SIGTERM waits until the block ends, and processes that are started in it never get one: a job
    system sends it to all of them at once, and Ray's own must outlive the workers' last save.
    The kernel may give it to another thread of this process instead, which doesn't block it; the
    library's handler then ends the block by its own `sys.exit(15)`, as Ray's does, and the handler
    from before decides after all.
    """
    if not _in_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM and callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """All but those that whoever started this process has it ignore, as `nohup` does.

    Python handles signals in the main thread; in another one there is nothing to wait for.
    """
    before: dict[int, Any] = {}
    if _in_main_thread():
        before = {
            number: signal.signal(number, handler)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_no_second(number: int, first: float) -> bool:
    """Whether a signal says nothing new: a terminal's end, or the same one twice."""
    return number == signal.SIGHUP or time.monotonic() - first < _SAME_SECONDS


def _leave_closed_terminal(number: int) -> None:
    """After SIGHUP the terminal is gone: writing to it would fail, and end what must go on."""
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None or stream.closed:
            continue
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # `isatty` says no once it is gone
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
