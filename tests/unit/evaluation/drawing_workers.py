"""One of two workers that draw an evaluation's pictures; run as a script, once a rank.

`drawing_workers.py FOLDER RANK WORLD_SIZE` draws those of FOLDER/recipe.json with the student of
FOLDER/checkpoint, into FOLDER/fsdp in two turns and into FOLDER/ddp in one.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from piflow.config import Recipe
from piflow.data.reader import EmbeddingStore
from piflow.evaluation.drawing import Drawing, Plan
from piflow.roles.trio import Trio
from piflow.sharding import build_strategy
from piflow.training.build import prepared_trio
from piflow.training.checkpoint import load_section


def base_values(trio: Trio) -> tuple[int, int]:
    """This worker's and all values of the base's parameters."""
    base = [p for name, p in trio.backbone.module.named_parameters() if "lora" not in name]
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in base)
    return held, sum(math.prod(p.shape) for p in base)


def draw(folder: Path, recipe: Recipe, name: str, world_size: int) -> None:
    store = EmbeddingStore.open(recipe.embed.store)
    strategy = build_strategy(name, world_size, torch.device("cpu"))
    trio = prepared_trio(recipe, strategy)
    held, whole = base_values(trio)
    assert held < 0.7 * whole if name == "fsdp" else held == whole
    load_section(folder / "checkpoint", "ema", trio.trainable_parameters())
    trio.train(False)
    drawing = Drawing(recipe, Plan.of(recipe, store, str(folder / name), "c"), store)
    if name == "fsdp":
        assert not drawing.draw(trio, strategy, stop=lambda: True)
        dist.barrier()  # rank 0 has written the index
        assert drawing.num_missing() == drawing.total - 4, "a round of two batches of two"
    assert drawing.draw(trio, strategy)
    held, _ = base_values(trio)
    assert held < 0.7 * whole if name == "fsdp" else held == whole, "blocks are sharded again"


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    for name in ("fsdp", "ddp"):
        draw(folder, recipe, name, world_size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
