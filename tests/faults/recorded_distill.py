"""`piflow distill` whose workers note the prompts of every step, and can be made slow or hang.

`recorded_distill.py RECIPE FOLDER PACE` takes at least PACE seconds a step. Every worker appends a
line a step to FOLDER/steps-PID.jsonl before it trains on it. A file FOLDER/hang makes the worker
that finds it first hang in that step. If there is a file FOLDER/clock at the start, what it says
(seconds) is added to the wall clock of driver and workers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from piflow import cli
from piflow.runtime import worker


def shift_clock(folder: str) -> None:
    """Add what FOLDER/clock says, looked up at every call, to this process's wall clock."""
    real_time, real_time_ns, clock = time.time, time.time_ns, Path(folder) / "clock"
    if not clock.exists():
        return

    def offset() -> int:
        return int(clock.read_text() or 0)

    time.time = lambda: real_time() + offset()
    time.time_ns = lambda: real_time_ns() + offset() * 10**9


def recorded(folder: str, pace: float) -> Callable[[dict[str, Any]], None]:
    """`train_worker` that notes its steps; goes to the workers as it is, by value."""
    train_worker = worker.train_worker

    def train(config: dict[str, Any]) -> None:
        from piflow.training.step import Trainer

        shift_clock(folder)
        original = Trainer.step

        def step(self: Any, number: int, micro_batches: Any) -> Any:
            ids = {batch.index: list(batch.prompt_ids) for batch in micro_batches}
            line = json.dumps({"step": number, "ids": ids, "workers": self.strategy.world_size})
            with (Path(folder) / f"steps-{os.getpid()}.jsonl").open("a") as file:
                file.write(line + "\n")
            time.sleep(pace)
            hang = Path(folder) / "hang"
            if hang.exists():
                hang.rename(hang.with_name(f"hung-{os.getpid()}"))
                time.sleep(3600)
            return original(self, number, micro_batches)

        Trainer.step = step  # type: ignore[method-assign]
        train_worker(config)

    return train


if __name__ == "__main__":
    recipe, records, seconds = sys.argv[1:]
    shift_clock(records)
    worker.train_worker = recorded(records, float(seconds))
    sys.argv = ["piflow", "distill", recipe, "--quiet"]
    cli.main()
