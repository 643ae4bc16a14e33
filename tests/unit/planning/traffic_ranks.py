"""What workers send in a step, recorded: `traffic_ranks.py FOLDER RANK WORLD_SIZE`.

Rank 0 writes FOLDER/traffic.json: strategy -> kind of collective -> bytes of whole tensors.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from piflow.config import Recipe
from piflow.data.batch import MicroBatch
from piflow.imitation import ImitationSettings, PartOfLoss, run_data_free
from piflow.planning.memory import keeping_codes
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.schedule import FewStep
from piflow.training.build import prepared_trio
from piflow.training.placement import strategy_for
from piflow.training.step import Trainer
from tests.unit.sharding.training import (
    FP8,
    LORA,
    MICRO_BATCHES,
    Run,
    inputs,
    micro_batch,
    recipe_of,
)

CPU = torch.device("cpu")
RUNS = {
    "ddp": Run(LORA, "ddp"),
    "fsdp": Run(LORA, "fsdp"),
    "fsdp, blocks stay whole": Run(LORA, "fsdp", ("reshard_after_forward: false",)),
    "fsdp, all weights": Run("all weights", "fsdp"),
    "fsdp, 8-bit weights": Run(FP8, "fsdp"),
    "hsdp": Run(LORA, "hsdp"),
}
_KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
_FEW = 2  # values of a loss or a norm


class Recorder(TorchDispatchMode):
    """Bytes of the collectives of weights and gradients; losses and norms are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            if name in _KINDS:  # the whole is the first tensor's, or the second's
                self.sent[_KINDS[name]] += max(args[0].nbytes, args[1].nbytes)
            elif name == "allreduce_":
                for tensor in (tensor for tensor in args[0] if tensor.numel() > _FEW):
                    self.sent["all-reduce"] += tensor.nbytes
        return func(*args, **(kwargs or {}))


class Segments:
    """π-ID as training does it, on made-up prompts; an objective for `Trainer`."""

    def __init__(self, trio: Trio, recipe: Recipe) -> None:
        self._trio, self._recipe = trio, recipe

    def losses(
        self, batch: MicroBatch, step: int, generator: torch.Generator
    ) -> Iterator[PartOfLoss]:
        x, _, cond = inputs(step, batch.index)
        objective = self._recipe.distillation()

        def student(x: Tensor, sigma: Tensor) -> Any:
            return self._trio.student(x, sigma, cond)

        return run_data_free(
            student,
            GuidedTeacher(self._trio, cond, None, self._recipe.guidance),
            x,
            FewStep.of(objective),
            ImitationSettings(objective.num_intermediate_states, objective.window_substeps),
            generator=generator,
        )


def traffic_recipe(run: Run, folder: Path | str) -> Recipe:
    """Two segments and three calls of the teacher each."""
    recipe = recipe_of(run, folder)
    few = {"nfe": 2, "num_intermediate_states": 3, "final_step_size_scale": 0.5}
    objective = recipe.distillation().model_copy(update=few)
    recipe = recipe.model_copy(update={"objective": objective})
    return keeping_codes(recipe, True) if run.scenario == FP8 else recipe


def record(run: Run, folder: Path) -> dict[str, int]:
    recipe = traffic_recipe(run, folder)
    strategy = strategy_for(recipe, dist.get_world_size(), CPU).strategy
    trio = prepared_trio(recipe, strategy)
    trainer = Trainer(
        Segments(trio, recipe),
        trio.trainable_parameters(),
        trio.ema_parameters(),
        strategy,
        recipe.training,
        0,
    )
    mine = range(strategy.rank, MICRO_BATCHES, strategy.world_size)
    with Recorder() as recorder:
        trainer.step(0, [micro_batch(0, index) for index in mine])
    return dict(recorder.sent)


def main(folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{processes}", rank=rank, world_size=processes
    )
    runs = {name: run for name, run in RUNS.items() if (processes == 4) == (name == "hsdp")}
    found = {name: record(run, folder) for name, run in runs.items()}
    if rank == 0:
        (folder / f"traffic-{processes}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
