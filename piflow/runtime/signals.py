"""SIGTERM and Ctrl-C in the driver."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StoppedError(RuntimeError):
    """The driver got a signal before the last step; the same command goes on with the run.

    Args:
        number: of the signal.
        state: what is saved.
    """

    def __init__(self, number: int, state: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}: {state}. The same command goes on with the run")
        self.number = number


class Signals:
    """SIGTERM and Ctrl-C while workers train: at the first they save and stop, not at the second.

    Python handles signals in the main thread; in another one there is nothing to wait for.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._passed_on = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self, mailbox: Any) -> None:
        """Ask the workers to stop, once.

        Raises:
            StoppedError: there are none yet.
        """
        import ray

        from piflow.runtime.mailbox import StopReason

        if self.number is None or self._passed_on:
            return
        self._passed_on = True
        if not ray.get(mailbox.ask_to_stop.remote(StopReason.END)):
            raise StoppedError(self.number, "no worker was training, nothing is lost")
        name = signal.Signals(self.number).name
        print(f"{name}: the workers save after this step and stop; once more ends them at once")

    def _handle(self, number: int, frame: object) -> None:
        if self.number is not None:
            raise StoppedError(number, "steps since the last checkpoint are lost")
        self.number = number
