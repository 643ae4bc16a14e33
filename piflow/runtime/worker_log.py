"""The end of a failed worker's log, from whichever machine it ran on, for the driver's terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from piflow.storage.foreign import shown

_LINES = 30
_LINE = 500  # characters
_TAIL_BYTES = 2**16
_ANSWER_SECONDS = 20.0  # a machine that is gone doesn't answer at all


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node_id: str
    pid: int
    host: str


def log_of(rank: int, place: Place) -> str:
    """The last lines that a worker wrote, or why they can't be read."""
    title = f"the log of worker {rank} (process {place.pid} on {shown(place.host, 100)})"
    where: Any = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    read = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(_last_lines)
    reference = read.remote(place.pid)
    try:
        lines = ray.get(reference, timeout=_ANSWER_SECONDS)
    except ray.exceptions.RayError as error:
        ray.cancel(reference, force=True)
        return f"{title} can't be read, its machine doesn't answer ({type(error).__name__})"
    if not lines:
        return f"{title} is empty"
    return "\n".join([f"{title} ends with:", *(f"  | {line}" for line in lines)])


def _last_lines(pid: int) -> list[str]:
    """Runs on the worker's machine."""
    node: Any = ray_worker.global_worker.node
    return last_lines(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"))


def last_lines(files: Iterable[Path]) -> list[str]:
    """Of the newest of some files; as they may stand in a terminal."""
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return []
    with newest.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return [shown(line, _LINE) for line in text.splitlines() if line.strip()][-_LINES:]
