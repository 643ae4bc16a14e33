"""What an export takes of a process's memory; run as a script, which prints three numbers.

`exported_memory.py FOLDER TINY` exports FOLDER/step by FOLDER/recipe.json, after it has done the
same in TINY, by which all that is imported on the way is there. It prints the bytes of resident
memory before, at most while exporting, and those of the adapter's file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from piflow.config import Recipe
from piflow.roles.adapter import WEIGHTS_FILE
from piflow.training.export import export_adapter


def resident(key: str) -> int:
    """Bytes, by the kernel's name: `VmRSS` now, `VmHWM` at most since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def export(folder: Path) -> Path:
    ours = Recipe.model_validate_json((folder / "recipe.json").read_text())
    step, out = str(folder / "step"), folder / "adapter"
    export_adapter(ours, step, str(out), weights="ema", dtype="bfloat16", lineage={})
    return out / WEIGHTS_FILE


def main(folder: Path, tiny: Path) -> None:
    export(tiny)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak, which the imports may be
    file = export(folder)
    print(before, resident("VmHWM"), file.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
