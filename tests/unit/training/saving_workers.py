"""One worker of a training that saves behind its steps; run as a script, once a rank.

`saving_workers.py FOLDER RANK WORLD_SIZE` writes checkpoints into FOLDER/run and, on rank 0, what
happened into FOLDER/results.pt.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from resharded_training import make, train, whole_state
from torch import Tensor

from piflow.config import TrainingConfig
from piflow.runs import folder as run_folder
from piflow.sharding import build_strategy
from piflow.training import checkpoint_writer
from piflow.training.checkpoint import CheckpointError, FileRecord, RunState, write_shards

SLOW_WRITER_SECONDS = 0.5


def write_late(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    """Rank 0's writer waits for rank 1's while both train."""
    time.sleep(SLOW_WRITER_SECONDS * dist.get_rank())
    return write_shards(folder, tensors, group)


def refuse(folder: Path, uri: str) -> str | None:
    return "no route to the storage" if dist.get_rank() == 1 else None


@contextmanager
def damaged_copy(uri: str, damaged: str, scratch: Path) -> Iterator[Path]:
    """A machine's own copy of a checkpoint; a byte of `damaged` is flipped in it."""
    copy = scratch / Path(uri).name
    shutil.copytree(uri, copy)
    if uri == damaged:
        shard = copy / "__0_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    yield copy


def train_and_save(folder: Path) -> dict[str, Any]:
    """Four steps, a checkpoint after each; then one that a worker can't store."""
    results: dict[str, Any] = {"losses": []}
    trainer = make("adamw", build_strategy("fsdp", 2, torch.device("cpu")))
    saves = checkpoint_writer.CheckpointSaver(str(folder / "run"), TrainingConfig(keep_last=2))
    for step in range(4):
        results["losses"] += train(trainer, step, step + 1)
        results[step + 1] = whole_state(trainer)
        saves.save(trainer, RunState(step + 1, 0, "", None, {}))
    results["unfinished"] = len(saves.take_finished())
    results["losses"] += train(trainer, 4, 6)
    saves.wait()
    results["kept"] = list(run_folder.checkpoints(str(folder / "run")))

    checkpoint_writer._upload = refuse
    saves.save(trainer, RunState(6, 0, "", None, {}))
    message = "it was saved"
    try:
        saves.wait()
    except CheckpointError as error:
        message = str(error)
    messages = [""] * 2
    dist.all_gather_object(messages, message)
    return {**results, "messages": messages}


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    checkpoint_writer.write_shards = write_late
    results = train_and_save(folder)

    run_dir = str(folder / "run")
    newest = run_folder.checkpoint_uri(run_dir, 4) if rank == 1 else ""
    resumed = make("adamw", build_strategy("fsdp", world_size, torch.device("cpu")))
    told: list[str] = []
    state = checkpoint_writer.restore_newest(
        run_dir, resumed, lambda uri: damaged_copy(uri, newest, folder / f"copy{rank}"), told.append
    )
    results |= {
        "restored": None if state is None else state.step,
        "told": told,
        "restored tensors": whole_state(resumed),
    }
    results["left"] = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
