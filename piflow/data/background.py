"""How data is worked on: ahead of its consumer in threads, and by Ray Data.

Ray Data shows no bars and banners of its own here, and errors come as they were raised.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from piflow.data.manifest import StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,  # "progress bars disabled"
    # tracebacks of tasks' errors, which are raised here anyway
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
}
_RAYS_ADVICE = "\nFailed to apply UDF transform"  # Ray appends it to a task's error message


def quiet_context(dataset: Any) -> Any:
    """Silence a new dataset's bars and banners, and keep its tasks' errors unwrapped.

    Returns:
        The dataset's own `DataContext`, shared by all that is derived from it, for more options.
    """
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    return context


def remote_cause(error: BaseException) -> BaseException:
    """The error that our code raised in a Ray task, without remote tracebacks in its message.

    Args:
        error: what Ray raised in this process; anything but a task's error comes back unchanged.
    """
    from ray.exceptions import RayTaskError

    if not isinstance(error, RayTaskError):
        return error
    cause = error.cause
    if isinstance(cause, OSError) and cause.errno is not None:
        return OSError(cause.errno, cause.strerror)
    for kind in (StoreError, ValueError, OSError):
        if isinstance(cause, kind):
            return kind(str(cause).split(_RAYS_ADVICE)[0])
    return error


def ahead(
    work: Callable[[Item], Result], items: Iterator[Item], *, threads: int = 1, depth: int = 2
) -> Iterator[Result]:
    """`map` in background threads, `depth` items ahead of the consumer, in the items' order."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
