"""Exports under a limit of memory; run as a script.

`exported_memory.py FOLDER TINY BYTES...` exports FOLDER/step by FOLDER/recipe.json, after it has
done the same in TINY, by which all that is imported on the way is there. Beyond what the process
has then, the kernel gives it BYTES and no more (RLIMIT_DATA, which counts the stacks of threads as
well). Prints a line for each limit: the bytes of the adapter's file, or "too little".
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from piflow.config import Recipe
from piflow.roles.adapter import WEIGHTS_FILE
from piflow.training.export import export_adapter


def data_bytes() -> int:
    """What the kernel counts against the limit."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def export(folder: Path) -> Path:
    ours = Recipe.model_validate_json((folder / "recipe.json").read_text())
    step, out = str(folder / "step"), folder / "adapter"
    export_adapter(ours, step, str(out), weights="ema", dtype="bfloat16", lineage={})
    return out / WEIGHTS_FILE


def main(folder: Path, tiny: Path, limits: list[int]) -> None:
    export(tiny)
    before = data_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_DATA, (before + limit, hard))
        try:
            print(export(folder).stat().st_size)
        except MemoryError:
            print("too little")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(limit) for limit in sys.argv[3:]])
