"""Short trainings that must not depend on the number of processes.

Imported by the test for one process, and run as a script, once a rank, for several:
`training.py FOLDER RANK WORLD_SIZE` writes FOLDER/results.pt on rank 0.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.backbones import Conditioning, FluxBackbone
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, LoRAConfig, PolicyConfig
from piflow.heads import PolicyClock
from piflow.sharding import Strategy, build_strategy
from piflow.trio import Trio

STEPS = 3
MICRO_BATCHES = 4
HEIGHT = WIDTH = 8
DTYPES = {
    "float32": torch.float32,
    "bfloat16_checkpointed": torch.bfloat16,
    "full": torch.bfloat16,  # of the teacher; the student is float32
}
SCENARIOS = ("float32", "bfloat16_checkpointed", "full", "pretraining")


@dataclass
class Result:
    """What one training leaves; `losses` are this process's, by (step, micro-batch)."""

    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)  # the EMA's velocity after training
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
    """Three AdamW steps of four micro-batches, spread over the strategy's processes."""
    result = Result()
    if scenario == "pretraining":
        backbone = FluxBackbone.load(folder / "flux")
        strategy.prepare(backbone.module, backbone.block_classes)
        run(result, strategy, dict(backbone.module.named_parameters()), backbone, None)
        result.trained = strategy.gather(dict(backbone.module.named_parameters()))
        return result
    trio = build(scenario, folder)
    if scenario == "bfloat16_checkpointed":
        trio.enable_gradient_checkpointing()
    base = {name: p.detach().clone() for name, p in frozen(trio).items()}
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    run(result, strategy, trio.trainable_parameters(), None, trio)
    result.trained = strategy.gather(trio.trainable_parameters())
    result.ema = strategy.gather(trio.ema_parameters())
    after = strategy.gather(frozen(trio))
    result.base_unchanged = all(torch.equal(tensor, base[name]) for name, tensor in after.items())
    x, sigma, cond = inputs(99, 0)
    result.drawn["velocity"] = trio.ema(x, sigma, cond).velocity(x, 0.5 * sigma)
    loaded = FluxBackbone.load(folder / "flux", dtype=DTYPES[scenario])
    # a copy: weights mapped from a file lie at odd addresses, where the CPU's matrix products round
    # otherwise than at aligned ones
    untouched = FluxBackbone(copy.deepcopy(loaded.module))
    result.teacher_unchanged = torch.equal(
        trio.teacher_velocity(x, sigma, cond), untouched.teacher_velocity(x, sigma, cond)
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


def run(
    result: Result,
    strategy: Strategy,
    parameters: dict[str, nn.Parameter],
    backbone: FluxBackbone | None,
    trio: Trio | None,
) -> None:
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, eps=1e-6, weight_decay=0.0)
    mine = range(strategy.rank, MICRO_BATCHES, strategy.world_size)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        for index in mine:
            torch.manual_seed(1000 * step + index)  # LoRA dropout
            arguments = inputs(step, index)
            if trio is not None:
                loss = student_loss(trio, *arguments)
            else:
                assert backbone is not None
                loss = pretraining_loss(backbone, *arguments)
            with strategy.gradient_sync(index == mine[-1]):
                (loss / len(mine)).backward()
            result.losses[step, index] = float(loss.detach())
        result.norms.append(strategy.clip_grad_norm(parameters.values(), 0.05))
        optimizer.step()
        if trio is not None:
            trio.update_ema(0.5)


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    init_method = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    results = {}
    for scenario in SCENARIOS:
        result = train(scenario, folder, build_strategy("fsdp", world_size, torch.device("cpu")))
        everyone: list[Result] = [Result()] * world_size
        dist.all_gather_object(everyone, result)
        for other in everyone:
            result.losses.update(other.losses)
            result.base_unchanged &= other.base_unchanged
            result.teacher_unchanged &= other.teacher_unchanged
        results[scenario] = vars(result)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
