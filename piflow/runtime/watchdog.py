"""How a worker that hangs comes to an end."""

from __future__ import annotations

import faulthandler

_STDERR = 2  # Ray writes it to the worker's log


class Watchdog:
    """Ends the process, after its threads' stacks went to its log, if it isn't kept from that.

    Its clock runs in a thread of C that needs no lock of Python's. A process that the system
    stopped is found out by Ray Train, which then gets no answer from it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def rearm(self) -> None:
        """All is well: the time starts anew."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)

    def end(self) -> None:
        """Nothing is due any more."""
        faulthandler.cancel_dump_traceback_later()
