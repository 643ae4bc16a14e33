"""Short trainings that must not depend on the number of processes.

Imported by the test for one process, and run as a script, once a rank, for several:
`training.py FOLDER RANK WORLD_SIZE NAME` does those of RUNS[WORLD_SIZE] that are in SLOW (NAME is
slow) or aren't (quick); rank 0 writes FOLDER/NAME-WORLD_SIZE.pt.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from piflow.backbones import Conditioning, FluxBackbone
from piflow.backbones.flux.fresh import average_of
from piflow.config import Recipe, parse_recipe
from piflow.data.batch import MicroBatch
from piflow.imitation import PartOfLoss
from piflow.roles.trio import Trio
from piflow.sharding import Strategy
from piflow.sharding.ddp import average_gradients
from piflow.training.blocks import prepare_blocks
from piflow.training.build import build_trio, prepared_trio
from piflow.training.context_parallel import split_tokens
from piflow.training.placement import strategy_for
from piflow.training.step import Trainer
from tests.unit.whole import gather

CPU = torch.device("cpu")
# traces and differentiates as the default does, whose C++ takes minutes; for four processes
# tracing alone, which is what differs between them
COMPILERS = {1: "aot_eager", 2: "aot_eager", 4: "eager"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 5
MICRO_BATCHES = 4
HEIGHT = WIDTH = 8
DX = {"type": "dx", "num_points": 3}
SCENARIOS: dict[str, dict[str, Any]] = {  # what is trained; decides the results
    "LoRA, float32 base": {},
    "LoRA, bfloat16 base": {"model": {"dtype": "bfloat16"}},
    "all weights": {"lora": None, "model": {"dtype": "bfloat16"}, "policy": DX},
    "fp8 teacher": {"model": {"fp8_teacher": {}}},
    "LoRA without dropout": {"lora": {"dropout": 0.0}},
    "8-bit AdamW": {  # of matrices large enough for it
        "lora": {"rank": 64},
        "policy": {"num_gaussians": 3, "logstd_inner_dim": 512},
        "training": {"optimizer": {"type": "adamw8bit"}},
    },
    "pre-training": {"objective": {"type": "flow_matching"}},
    "Muon": {
        "objective": {"type": "flow_matching"},
        "training": {"optimizer": {"type": "muon"}},
    },
}
LORA, LORA_BF16, FULL, FP8, NO_DROPOUT, EIGHT_BITS, PRETRAINING, MUON = SCENARIOS
DISTILLATIONS = (LORA, LORA_BF16, FULL, FP8, NO_DROPOUT, EIGHT_BITS)
STRATEGIES: dict[str, dict[str, Any]] = {  # as the docs call them -> the runtime section
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp", "reshard_after_forward": True},
    "hsdp": {"strategy": "fsdp", "reshard_after_forward": True, "shard_size": 2},
    "zero1": {"strategy": "deepspeed", "deepspeed": {"stage": 1}},
    "zero2": {"strategy": "deepspeed", "deepspeed": {"stage": 2}},
    "zero3": {"strategy": "deepspeed", "deepspeed": {"stage": 3}},
}
OPTIONS: dict[str, dict[str, Any]] = {  # how it is trained; never changes the results
    "activation_checkpointing: full": {"activation_checkpointing": "full"},
    "activation_checkpointing: selective": {"activation_checkpointing": "selective"},
    "compile: true": {"compile": True},
    "context_parallel: 2": {"context_parallel": 2},
    "reshard_after_forward: false": {"reshard_after_forward": False},
    "offload: cpu": {"offload": "cpu"},
    "deepspeed.offload_optimizer: cpu": {"deepspeed": {"offload_optimizer": "cpu"}},
    "deepspeed.offload_parameters: cpu": {"deepspeed": {"offload_parameters": "cpu"}},
}
AGAIN, SOME_AGAIN, COMPILE, TOGETHER, WHOLE, OFFLOAD, OFFLOAD_STATE, OFFLOAD_WEIGHTS = OPTIONS
OFFLOAD_ALL = (OFFLOAD_STATE, OFFLOAD_WEIGHTS)


class Run(NamedTuple):
    """One training; `options` are combined."""

    scenario: str
    strategy: str
    options: tuple[str, ...] = ()


def option_run(option: str, strategy: str) -> Run:
    """A run that shows an option: most go with everything that LORA has."""
    return Run(NO_DROPOUT if option == TOGETHER else LORA, strategy, (option,))


RUNS = {  # by number of processes
    1: [
        Run(LORA, "single", (AGAIN,)),
        Run(LORA, "single", (SOME_AGAIN,)),
        Run(LORA, "single", (COMPILE,)),
        Run(LORA, "fsdp", (OFFLOAD,)),
        Run(LORA, "zero2", (OFFLOAD_STATE,)),
        Run(LORA, "zero3", OFFLOAD_ALL),
    ],
    2: [
        *(Run(LORA, name) for name in ("ddp", "fsdp", "zero2", "zero3")),
        *(Run(LORA, name, (SOME_AGAIN,)) for name in ("ddp", "fsdp", "zero2")),
        *(Run(LORA, name, (COMPILE,)) for name in ("ddp", "fsdp", "zero1", "zero2")),
        Run(LORA, "fsdp", (WHOLE, AGAIN)),
        Run(LORA, "zero1", (OFFLOAD_STATE, SOME_AGAIN)),
        Run(LORA, "zero2", (OFFLOAD_STATE, AGAIN)),
        *(Run(LORA_BF16, name, (AGAIN,)) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        Run(LORA_BF16, "fsdp", (OFFLOAD, SOME_AGAIN)),
        *(Run(FULL, name) for name in ("ddp", "zero1", "zero2")),
        Run(FULL, "fsdp", (WHOLE,)),
        Run(FULL, "zero3", OFFLOAD_ALL),
        *(Run(PRETRAINING, name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        *(Run(FP8, name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        Run(MUON, "ddp"),
        *(Run(EIGHT_BITS, name) for name in ("ddp", "fsdp")),
        *(Run(NO_DROPOUT, name, (TOGETHER,)) for name in ("zero1", "zero3")),
        *(Run(NO_DROPOUT, name, (TOGETHER, AGAIN)) for name in ("ddp", "zero2")),
        Run(NO_DROPOUT, "fsdp", (TOGETHER, SOME_AGAIN)),
        Run(FULL, "ddp", (TOGETHER,)),
        Run(PRETRAINING, "fsdp", (TOGETHER,)),
    ],
    4: [
        Run(LORA, "hsdp"),
        Run(LORA, "hsdp", (COMPILE,)),
        Run(LORA_BF16, "hsdp", (AGAIN,)),
        Run(LORA_BF16, "hsdp", (OFFLOAD, SOME_AGAIN)),
        Run(FULL, "hsdp", (WHOLE,)),
        Run(PRETRAINING, "hsdp"),
        Run(FP8, "hsdp"),
        Run(EIGHT_BITS, "hsdp"),
        Run(NO_DROPOUT, "hsdp", (TOGETHER,)),
        Run(NO_DROPOUT, "ddp", (TOGETHER,)),
    ],
}

SLOW = [  # minutes of them all, and each has a quick one that is much alike
    *(Run(LORA, name, (SOME_AGAIN,)) for name in ("ddp", "zero2")),
    *(Run(LORA, name, (COMPILE,)) for name in ("ddp", "zero1", "zero2", "hsdp")),
    Run(LORA, "zero1", (OFFLOAD_STATE, SOME_AGAIN)),
    *(Run(LORA_BF16, name, (AGAIN,)) for name in ("zero1", "zero3")),
    Run(LORA_BF16, "hsdp", (OFFLOAD, SOME_AGAIN)),
    Run(FULL, "zero1"),
    Run(FULL, "ddp", (TOGETHER,)),
    *(Run(PRETRAINING, name) for name in ("zero1", "zero2", "zero3", "hsdp")),
    *(Run(FP8, name) for name in ("zero1", "zero2", "zero3", "hsdp")),
    Run(EIGHT_BITS, "hsdp"),
    *(Run(NO_DROPOUT, name, (TOGETHER,)) for name in ("zero1", "zero3")),
]


TINY_FLUX = {
    "in_channels": 48,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (2, 2, 4),
}


def save_model(folder: Path) -> None:
    """The teacher of all trainings, as FOLDER/flux."""
    torch.manual_seed(0)
    FluxTransformer2DModel(**TINY_FLUX).save_pretrained(str(folder / "flux"))


def world_size(run: Run) -> int:
    """Processes of a run of RUNS; of any other, as many as its strategy needs."""
    least = {"single": 1, "hsdp": 4}.get(run.strategy, 2)
    return next((number for number, runs in RUNS.items() if run in runs), least)


def recipe_of(run: Run, folder: Path | str = "unused") -> Recipe:
    """The run as a user would write it.

    Raises:
        RecipeError: it is refused.
    """
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "unused",
        "model": {"path": f"{folder}/flux"},
        "encoder": {"path": "unused"},
        "policy": {"num_gaussians": 3, "logstd_inner_dim": 16},
        "lora": {"rank": 4, "dropout": 0.1},
        "embed": {"prompts": "p", "store": "s", "height": 16, "width": 16},
        "objective": {"final_step_size_scale": 1 / 3},
        "training": {
            "batch_size": MICRO_BATCHES,
            "micro_batch_size": 1,
            "optimizer": {"lr": 1e-3, "warmup_steps": 0, "clip_norm": 0.05},
            "ema": {"start": 0, "beta": 0.5},
        },
        "runtime": {"num_workers": world_size(run)},
    }
    changes = [SCENARIOS[run.scenario], {"runtime": STRATEGIES[run.strategy]}]
    for changed in [*changes, *({"runtime": OPTIONS[name]} for name in run.options)]:
        tree = _merged(tree, changed)
    return parse_recipe(tree)


def _merged(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both; sections that both have are merged, of values `other`'s count."""
    both = dict(tree)
    for key, value in other.items():
        old = both.get(key)
        sections = isinstance(old, dict) and isinstance(value, dict)
        merge = sections and key not in ("policy", "objective")  # another kind has other keys
        both[key] = _merged(old, value) if merge else value
    return both


@dataclass
class Result:
    """What one training leaves; `losses` are this process's, by (step, micro-batch)."""

    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)  # the EMA's velocity after training
    digest: str = ""  # of this process's trained weights
    replicas_equal: bool = True
    base_unchanged: bool = True
    held: int = 0  # bytes of weights on this process
    teacher_unchanged: bool = True


def inputs(step: int, index: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, sigma and prompt of one sample, the same in every process."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    x = torch.randn(1, 12, HEIGHT, WIDTH, generator=generator)
    sigma = 0.5 + 0.5 * torch.rand(1, generator=generator)
    cond = Conditioning(
        torch.randn(1, 6, 6, generator=generator),
        torch.tensor([6]),
        torch.randn(1, 6, generator=generator),
    )
    return x, sigma, cond


def micro_batch(step: int, index: int) -> MicroBatch:
    """The same sample, as data hands it to the trainer."""
    x, _, cond = inputs(step, index)
    sides = 2 * HEIGHT, 2 * WIDTH
    return MicroBatch(index, ("",), ("",), cond.tokens, cond.num_tokens, cond.pooled, *sides, x)


def student_loss(trio: Trio, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """Student, two teacher calls and an EMA call, as a distillation step orders them."""
    policy = trio.student(x, sigma, cond)
    loss = x.new_zeros(())
    for share in (0.8, 0.4):
        later = share * sigma
        target = trio.teacher_velocity(x, later, cond)
        loss = loss + (policy.velocity(x, later) - target).square().mean()
    trio.ema(x, sigma, cond)
    return loss


def pretraining_loss(
    backbone: FluxBackbone, x: Tensor, sigma: Tensor, cond: Conditioning
) -> Tensor:
    return (backbone(x, sigma, cond) - x).square().mean()


class Recorded:
    """An objective for `Trainer`: `student_loss`, or `pretraining_loss`; keeps what they were."""

    def __init__(self, model: Trio | FluxBackbone) -> None:
        self._model = model
        self.seen: dict[tuple[int, int], float] = {}  # by (step, micro-batch)

    def losses(
        self, batch: MicroBatch, step: int, generator: torch.Generator
    ) -> Iterator[PartOfLoss]:
        torch.manual_seed(1000 * step + batch.index)  # LoRA dropout, as in the golden files
        x, sigma, cond = inputs(step, batch.index)
        if isinstance(self._model, Trio):
            loss = student_loss(self._model, x, sigma, cond)
        else:
            loss = pretraining_loss(self._model, x, sigma, cond)
        self.seen[step, batch.index] = float(loss.detach())
        yield loss, True


def train(run: Run, folder: Path) -> Result:
    """Five optimiser steps of four micro-batches, spread over the strategy's processes."""
    recipe = recipe_of(run, folder)
    strategy = strategy_for(recipe, world_size(run), CPU).strategy
    if run.scenario in DISTILLATIONS:
        return distil(recipe, strategy)
    backbone = FluxBackbone.load(folder / "flux")
    average = average_of(backbone)
    modules = (backbone.module, average.module)
    prepare_blocks(recipe.runtime, backbone, modules, backend=COMPILERS[strategy.world_size])
    split_tokens(backbone, modules, recipe.runtime.context_parallel, CPU)
    for module in modules:
        strategy.prepare(module, backbone.block_classes)
    weights, averages = (dict(module.named_parameters()) for module in modules)
    return run_steps(Recorded(backbone), weights, averages, strategy, recipe)


def distil(recipe: Recipe, strategy: Strategy) -> Result:
    """The recipe's trio, trained; its base and its teacher are compared with untouched ones."""
    compiler = partial(prepare_blocks, backend=COMPILERS[strategy.world_size])
    with mock.patch("piflow.training.build.prepare_blocks", compiler):
        trio = prepared_trio(recipe, strategy)
    weights = [p for module in trio.modules for p in module.parameters()]
    held = sum(strategy.local(weight).nbytes for weight in weights)
    trained, averages = trio.trainable_parameters(), trio.ema_parameters()
    result = run_steps(Recorded(trio), trained, averages, strategy, recipe)
    result.held = held
    base, after = frozen(build_trio(recipe)), gather(strategy, frozen(trio))
    result.base_unchanged = all(torch.equal(tensor, base[name]) for name, tensor in after.items())
    x, sigma, cond = inputs(99, 0)
    result.drawn["velocity"] = trio.ema(x, sigma, cond).velocity(x, 0.5 * sigma)
    loaded = FluxBackbone.load(recipe.model.path, dtype=DTYPES[recipe.model.dtype])
    # weights mapped from a file lie at odd addresses, where the CPU's matrix products round
    # otherwise than at aligned ones: replicas keep those, shards are copies
    untouched = (loaded, FluxBackbone(copy.deepcopy(loaded.module)))
    with trio.exact_teacher():
        velocity = trio.teacher_velocity(x, sigma, cond)
    # attention over tokens in another order is another sum
    atol = 1e-6 if recipe.runtime.context_parallel > 1 else 0.0
    result.teacher_unchanged = any(
        torch.allclose(velocity, backbone.teacher_velocity(x, sigma, cond), rtol=0, atol=atol)
        for backbone in untouched
    )
    return result


def frozen(trio: Trio) -> dict[str, nn.Parameter]:
    """Everything that is neither trained nor averaged: the base with the teacher's output layer."""
    own = {id(p) for p in [*trio.trainable_parameters().values(), *trio.ema_parameters().values()]}
    return {
        f"{number}.{name}": parameter
        for number, module in enumerate(trio.modules)
        for name, parameter in module.named_parameters()
        if id(parameter) not in own
    }


def run_steps(
    objective: Recorded,
    parameters: dict[str, nn.Parameter],
    averages: dict[str, nn.Parameter],
    strategy: Strategy,
    recipe: Recipe,
) -> Result:
    """What the product's own trainer makes of the prepared parameters."""
    together = recipe.runtime.context_parallel  # workers of one micro-batch
    trainer = Trainer(
        objective, parameters, averages, strategy, recipe.training, 0, context_parallel=together
    )
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if "eps" in group and recipe.training.optimizer.type != "muon":
                # else noise in gradients of nearly 0 is scaled up to full steps
                group["eps"] = 1e-6
    mine = range(strategy.rank // together, MICRO_BATCHES, strategy.world_size // together)
    norms = [
        trainer.step(step, [micro_batch(step, index) for index in mine]).grad_norm
        for step in range(STEPS)
    ]
    values = [strategy.local(parameter).numpy().tobytes() for parameter in parameters.values()]
    return Result(
        losses=objective.seen,
        norms=norms,
        trained=gather(strategy, parameters),
        ema=gather(strategy, averages),
        digest=hashlib.sha256(b"".join(values)).hexdigest(),
    )


def replica_gradients(rank: int) -> list[Tensor | None]:
    """Means over two processes: used by both, by rank 1 alone, by none; and another dtype."""
    shapes = [(3,), (2, 2), (1,), (4,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    parameters[0].grad = torch.full((3,), 1.0 + 2 * rank)
    if rank == 1:
        parameters[1].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T  # not contiguous
    parameters[3].grad = torch.full((4,), float("inf") if rank else 0.0)
    parameters[4].grad = torch.full((2,), 2.0 * rank, dtype=torch.bfloat16)
    average_gradients(parameters, CPU, bucket_bytes=20)
    return [parameter.grad for parameter in parameters]


def automatic(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What both processes get where it is left open, for a small and an impossible micro-batch."""
    chosen: dict[str, list[tuple[str, str]]] = {}
    tree = recipe_of(Run(LORA, "fsdp"), folder).model_dump(mode="json")
    tree["runtime"]["reshard_after_forward"] = None
    for name, strategy, samples in (
        ("small", "auto", 2),
        ("small shards", "fsdp", 2),
        ("impossible", "auto", 10**9),
    ):
        tree["runtime"]["strategy"] = strategy
        tree["training"] |= {"batch_size": 2 * samples, "micro_batch_size": samples}
        placed = strategy_for(parse_recipe(tree), 2, CPU)
        everyone = [("", "")] * 2
        told = " ".join(placed.reasons)
        dist.all_gather_object(everyone, (type(placed.strategy).__name__, told))
        chosen[name] = everyone
    return chosen


def main(folder: Path, rank: int, processes: int, name: str) -> None:
    torch.set_num_threads(1)
    init_method = f"file://{folder}/rendezvous-{name}-{processes}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=processes)
    results: dict[Any, object] = {}
    for run in (run for run in RUNS[processes] if (run in SLOW) == (name == "slow")):
        began = time.perf_counter()
        result = train(run, folder)
        if rank == 0:
            print(f"{time.perf_counter() - began:.1f} s {run}", flush=True)
        everyone: list[Result] = [Result()] * processes
        dist.all_gather_object(everyone, result)
        for other in everyone:
            result.losses.update(other.losses)
            result.replicas_equal &= other.digest == result.digest
            result.base_unchanged &= other.base_unchanged
            result.teacher_unchanged &= other.teacher_unchanged
        results[tuple(run)] = vars(result)
    if (name, processes) == ("quick", 2):
        results["gradients"] = replica_gradients(rank)
        results["choice"] = automatic(folder)
    if rank == 0:
        torch.save(results, folder / f"{name}-{processes}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
