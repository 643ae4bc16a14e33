"""The next step's batch, read and brought to the device while a step computes.

    train thread    step n ─────────────────────────────┐ step n + 1
    own thread      read n + 1, copy it (side stream) ──┘ read n + 2, ...

One batch ahead: the next is taken up when the one before it is handed out. An error of the reader
comes where its batch would have come.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """An iterator's items, each made and prepared in a thread before it is asked for.

    Args:
        items: is used in that thread alone, and closed there.
        prepare: of an item; what it queues on a device is nobody's business here.
    """

    def __init__(self, items: Iterator[Item], prepare: Callable[[Item], Item]) -> None:
        self._items = items
        self._prepare = prepare
        self._wanted = threading.Semaphore(1)  # one ahead of the first
        self._ended = False
        self._made: queue.SimpleQueue[tuple[Item | None, BaseException | None]]
        self._made = queue.SimpleQueue()
        # a daemon: a reader that never answers must not keep the process
        threading.Thread(target=self._run, name="next-batch", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended = True
        self._wanted.release()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        """The next item.

        Raises:
            StopIteration: there is none.
            Exception: what reading or preparing it raised.
        """
        item, error = self._made.get()
        if error is not None:
            self._made.put((None, error))  # it stays so
            raise error
        self._wanted.release()
        return item  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            while True:
                self._wanted.acquire()
                if self._ended:
                    break
                self._made.put((self._prepare(next(self._items)), None))
        except BaseException as error:  # whoever waits for it shall raise it
            self._made.put((None, error))
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
