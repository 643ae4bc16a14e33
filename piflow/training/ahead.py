"""The next step's batch, on its way to the device while a step computes.

    take batch n + 1 from the reader, start to copy it │ compute step n
    take batch n + 2, start to copy it                 │ compute step n + 1

Readers decode ahead in threads or processes of their own, so that the batch is there when it is
taken; and copies are queued in a side stream (`piflow.sharding.side_stream`), so that they run
beside the step's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def one_ahead(items: Iterator[Item], prepare: Callable[[Item], Item]) -> Iterator[Item]:
    """The prepared items; when one is handed out, the next one has been taken and prepared.

    An error of taking or preparing an item is raised where the item would have come: the step
    before it isn't lost.
    """
    upcoming, failure = _taken(items, prepare)
    while failure is None:
        current = upcoming
        upcoming, failure = _taken(items, prepare)
        yield from current
    if not isinstance(failure, StopIteration):
        raise failure


def _taken(
    items: Iterator[Item], prepare: Callable[[Item], Item]
) -> tuple[list[Item], Exception | None]:
    try:
        return [prepare(next(items))], None
    except Exception as error:  # raised by `one_ahead` in its turn
        return [], error
