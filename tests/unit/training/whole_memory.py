"""A merged export under a limit of memory; run as a script.

`whole_memory.py FOLDER TINY BYTES` exports FOLDER/step by FOLDER/recipe.json as a whole, after the
same in TINY, by which all that is imported is there. The kernel gives it BYTES more than it has
then (RLIMIT_DATA). Prints how many bytes the weights' files have, or "too little".
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from piflow.config import Recipe
from piflow.training.export_whole import export_whole
from tests.unit.training.exported_memory import data_bytes

SHARD = 16 * 2**20


def export(folder: Path) -> int:
    ours = Recipe.model_validate_json((folder / "recipe.json").read_text())
    step, out = str(folder / "step"), folder / "merged"
    export_whole(
        ours,
        step,
        str(out),
        kind="merged",
        weights="ema",
        dtype="bfloat16",
        lineage={},
        max_shard_bytes=SHARD,
    )
    return sum(file.stat().st_size for file in (out / "transformer").glob("*.safetensors"))


if __name__ == "__main__":
    export(Path(sys.argv[2]))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + int(sys.argv[3]), hard))
    try:
        print(export(Path(sys.argv[1])))
    except MemoryError:
        print("too little")
