"""Every start of a run's workers, by whichever driver, in a file each: RUN_DIR/starts/000002.json

    {"number": 2, "time": "2026-11-23T10:04:12Z", "step": 120, "workers": 8, "reason": "resume"}

So that a run's curves say where it was interrupted, for how long, and what it went on with.
"""

from __future__ import annotations

import json
import re
import time

from piflow import storage

FOLDER = "starts"  # in the run's
_NAME = re.compile(r"(\d{6,})\.json")


def note_start(run_dir: str, *, step: int, workers: int, reason: str) -> tuple[int, str]:
    """Write a start's file; of a run's processes one at a time does so, the workers' first.

    Args:
        step: optimiser steps that were done before.
        reason: "start": the first workers of a driver, which for all but the run's own first ones
            is kept as "resume"; "restart" and "resize": by the same driver, with as many workers
            or another number.

    Returns:
        The start's number, from 1, and its file's path in the run's folder.
    """
    names = storage.list_files(storage.join(run_dir, FOLDER))
    numbers = [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]
    number = max(numbers, default=0) + 1
    content = {
        "number": number,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "workers": workers,
        "reason": "resume" if reason == "start" and number > 1 else reason,
    }
    name = f"{FOLDER}/{number:06d}.json"
    storage.write_bytes(storage.join(run_dir, name), json.dumps(content).encode())
    return number, name
