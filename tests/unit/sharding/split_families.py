"""Gradients of a distillation's step by two processes that share each sample's tokens.

Imported by the test for one process, and run as a script: `split_families.py FOLDER RANK 2`; rank 0
writes FOLDER/results.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from piflow.backbones import Conditioning
from piflow.config import GMFlowPolicyConfig, LoRAConfig
from piflow.roles.trio import Trio
from piflow.sharding import FSDPStrategy
from piflow.training.context_parallel import split_tokens
from tests.conformance import conftest as families
from tests.unit.sharding.training import CPU, student_loss
from tests.unit.whole import gather

FAMILIES = ("flux2", "qwen_image")  # training.py is about flux


def gradients(family: str, strategy: FSDPStrategy | None = None) -> dict[str, Tensor]:
    """Of the student's weights by name, whole, with the loss; none of the LoRA weights is zero."""
    backbone, cond, (height, width) = getattr(families, family)()
    cond = Conditioning(F.pad(cond.tokens, (0, 0, 0, cond.tokens.shape[1] % 2)), cond.num_tokens)
    generator = torch.Generator().manual_seed(1)
    trio = Trio.from_backbone(
        backbone,
        LoRAConfig(rank=4, dropout=0.0),
        GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=16),
        None,
        generator=generator,
    )
    with torch.no_grad():
        for parameter in trio.trainable_parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(3, backbone.latent_channels, height, width, generator=generator)
    if strategy is not None:
        split_tokens(trio.backbone, trio.modules, 2, CPU)
        for module in trio.modules:
            strategy.prepare(module, trio.block_classes)
    loss = student_loss(trio, x, torch.tensor([1.0, 0.6, 0.3]), cond)
    if strategy is None:
        loss.backward()
        found = {n: p.grad for n, p in trio.trainable_parameters().items() if p.grad is not None}
    else:
        strategy.backward(2 * loss, last=True)  # both have the loss, and their mean is taken
        parameters = trio.trainable_parameters().items()
        found = gather(strategy, {n: p.grad for n, p in parameters if p.grad is not None})
    return {**found, "loss": loss.detach()}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=2)
    results = {family: gradients(family, FSDPStrategy(CPU)) for family in FAMILIES}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
