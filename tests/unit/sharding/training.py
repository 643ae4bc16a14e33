"""Short trainings that must not depend on the number of processes.

Imported by the test for one process, and run as a script, once a rank, for several:
`training.py FOLDER RANK WORLD_SIZE` does RUNS[WORLD_SIZE]; rank 0 writes
FOLDER/results-WORLD_SIZE.pt.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.backbones import Conditioning, FluxBackbone
from piflow.config import (
    DeepSpeedConfig,
    DXPolicyConfig,
    GMFlowPolicyConfig,
    LoRAConfig,
    OptimizerConfig,
    PolicyConfig,
    parse_recipe,
)
from piflow.heads import PolicyClock
from piflow.optimizers import build_optimizers
from piflow.sharding import Strategy, build_strategy, local_shard
from piflow.sharding.choice import strategy_for
from piflow.sharding.ddp import average_gradients
from piflow.trio import Trio

CPU = torch.device("cpu")
STEPS = 5
MICRO_BATCHES = 4
HEIGHT = WIDTH = 8
DTYPES = {
    "float32": torch.float32,
    "bfloat16_checkpointed": torch.bfloat16,
    "full": torch.bfloat16,  # of the teacher; the student is float32
}
DISTILLATIONS = ("float32", "bfloat16_checkpointed", "full")
PRETRAININGS = ("pretraining", "muon")
RUNS = {  # (scenario, variant of a strategy) by number of processes
    1: [("float32", "zero3_offload"), ("float32", "zero2_offload")],
    2: [
        *((scenario, "fsdp") for scenario in (*DISTILLATIONS, "pretraining")),
        ("float32", "fsdp_whole_blocks"),
        ("full", "fsdp_whole_blocks"),
        *((scenario, "ddp") for scenario in (*DISTILLATIONS, *PRETRAININGS)),
        *((scenario, "zero2") for scenario in (*DISTILLATIONS, "pretraining")),
        *((scenario, "zero3") for scenario in DISTILLATIONS),
        *(("float32", name) for name in ("zero1", "zero1_offload", "zero2_offload")),
        ("full", "zero3_offload"),
    ],
    4: [("float32", "hsdp"), ("full", "hsdp")],
}


def variant(name: str, world_size: int) -> Strategy:
    """A strategy with options, on the running process group."""
    if name == "fsdp_whole_blocks":
        return build_strategy("fsdp", world_size, CPU, reshard_after_forward=False)
    if name == "hsdp":
        return build_strategy("fsdp", world_size, CPU, shard_size=2)
    if name.startswith("zero"):
        stage, *offload = name.removeprefix("zero").split("_")
        options = DeepSpeedConfig.model_validate(
            {
                "stage": int(stage),
                "offload_optimizer": "cpu" if offload else "none",
                "offload_parameters": "cpu" if offload and stage == "3" else "none",
            }
        )
        return build_strategy("deepspeed", world_size, CPU, deepspeed=options)
    return build_strategy("ddp" if name == "ddp" else "fsdp", world_size, CPU)


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
    teacher_unchanged: bool = True


def inputs(step: int, index: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, sigma and prompt of one sample, the same in every process."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    x = torch.randn(1, 12, HEIGHT, WIDTH, generator=generator)
    sigma = 0.5 + 0.5 * torch.rand(1, generator=generator)
    cond = Conditioning(
        torch.randn(1, 5, 6, generator=generator),
        torch.tensor([5]),
        torch.randn(1, 6, generator=generator),
    )
    return x, sigma, cond


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


def train(scenario: str, folder: Path, strategy: Strategy) -> Result:
    """Five optimiser steps of four micro-batches, spread over the strategy's processes."""
    result = Result()
    if scenario in PRETRAININGS:
        backbone = FluxBackbone.load(folder / "flux")
        strategy.prepare(backbone.module, backbone.block_classes)
        config = OptimizerConfig(type="muon" if scenario == "muon" else "adamw", lr=1e-3)
        run(result, strategy, dict(backbone.module.named_parameters()), config, backbone, None)
        result.trained = strategy.gather(dict(backbone.module.named_parameters()))
        return result
    trio = build(scenario, folder)
    if scenario == "bfloat16_checkpointed":
        trio.enable_gradient_checkpointing()
    base = {name: p.detach().clone() for name, p in frozen(trio).items()}
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    run(result, strategy, trio.trainable_parameters(), OptimizerConfig(lr=1e-3), None, trio)
    result.trained = strategy.gather(trio.trainable_parameters())
    result.ema = strategy.gather(trio.ema_parameters())
    after = strategy.gather(frozen(trio))
    result.base_unchanged = all(torch.equal(tensor, base[name]) for name, tensor in after.items())
    x, sigma, cond = inputs(99, 0)
    result.drawn["velocity"] = trio.ema(x, sigma, cond).velocity(x, 0.5 * sigma)
    loaded = FluxBackbone.load(folder / "flux", dtype=DTYPES[scenario])
    # weights mapped from a file lie at odd addresses, where the CPU's matrix products round
    # otherwise than at aligned ones: replicas keep those, shards are copies
    untouched = (loaded, FluxBackbone(copy.deepcopy(loaded.module)))
    velocity = trio.teacher_velocity(x, sigma, cond)
    result.teacher_unchanged = any(
        torch.equal(velocity, backbone.teacher_velocity(x, sigma, cond)) for backbone in untouched
    )
    return result


def build(scenario: str, folder: Path) -> Trio:
    """A GM student by LoRA; or a DX student, all of whose weights are trained."""
    full = scenario == "full"
    policy: PolicyConfig = GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=16)
    if full:
        policy = DXPolicyConfig(num_points=3)
    return Trio.from_backbone(
        FluxBackbone.load(folder / "flux", dtype=DTYPES[scenario]),
        None if full else LoRAConfig(rank=4, dropout=0.1),
        policy,
        PolicyClock(0.3, 3.2),
        generator=torch.Generator().manual_seed(0),
    )


def frozen(trio: Trio) -> dict[str, nn.Parameter]:
    """Everything that is neither trained nor averaged: the base with the teacher's output layer."""
    own = {id(p) for p in [*trio.trainable_parameters().values(), *trio.ema_parameters().values()]}
    return {
        f"{number}.{name}": parameter
        for number, module in enumerate(trio.modules)
        for name, parameter in module.named_parameters()
        if id(parameter) not in own
    }


def digest(parameters: Iterable[nn.Parameter]) -> str:
    """sha256 of this process's own values."""
    values = [local_shard(parameter).numpy().tobytes() for parameter in parameters]
    return hashlib.sha256(b"".join(values)).hexdigest()


def run(
    result: Result,
    strategy: Strategy,
    parameters: dict[str, nn.Parameter],
    config: OptimizerConfig,
    backbone: FluxBackbone | None,
    trio: Trio | None,
) -> None:
    optimizers = build_optimizers(parameters, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "eps" in group and config.type == "adamw":
                group["eps"] = (
                    1e-6  # else noise in gradients of nearly 0 is scaled up to full steps
                )
    strategy.adopt(optimizers)
    mine = range(strategy.rank, MICRO_BATCHES, strategy.world_size)
    for step in range(STEPS):
        for parameter in parameters.values():
            parameter.grad = None
        for index in mine:
            torch.manual_seed(1000 * step + index)  # LoRA dropout
            arguments = inputs(step, index)
            if trio is not None:
                loss = student_loss(trio, *arguments)
            else:
                assert backbone is not None
                loss = pretraining_loss(backbone, *arguments)
            strategy.backward(loss / len(mine), last=index == mine[-1])
            result.losses[step, index] = float(loss.detach())
        result.norms.append(strategy.update(parameters.values(), optimizers, 0.05))
        if trio is not None:
            trio.update_ema(0.5)
    result.digest = digest(parameters.values())


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


def automatic(folder: Path, world_size: int) -> dict[str, list[tuple[str, str]]]:
    """What every process gets under `auto`, for a small and an impossible micro-batch."""
    chosen: dict[str, list[tuple[str, str]]] = {}
    for name, samples in (("small", 2), ("impossible", 10**12)):
        tree = {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(folder / "flux")},
            "encoder": {"path": "unused"},
            "embed": {"prompts": "p", "store": "s", "height": 16, "width": 16},
            "training": {"batch_size": 2 * samples, "micro_batch_size": samples},
            "runtime": {"num_workers": world_size},
        }
        strategy, reason = strategy_for(parse_recipe(tree), world_size, CPU)
        everyone = [("", "")] * world_size
        dist.all_gather_object(everyone, (type(strategy).__name__, reason))
        chosen[name] = everyone
    return chosen


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    init_method = f"file://{folder}/rendezvous-{world_size}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    results: dict[tuple[str, str], object] = {}
    for scenario, name in RUNS[world_size]:
        result = train(scenario, folder, variant(name, world_size))
        everyone: list[Result] = [Result()] * world_size
        dist.all_gather_object(everyone, result)
        for other in everyone:
            result.losses.update(other.losses)
            result.replicas_equal &= other.digest == result.digest
            result.base_unchanged &= other.base_unchanged
            result.teacher_unchanged &= other.teacher_unchanged
        results[scenario, name] = vars(result)
    if world_size == 2:
        results["gradients", "ddp"] = replica_gradients(rank)
        results["choice", "auto"] = automatic(folder, world_size)
    if rank == 0:
        torch.save(results, folder / f"results-{world_size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
