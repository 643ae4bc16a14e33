"""One process: nothing is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from piflow.sharding.base import clip_grad_norm, gather


class SingleStrategy:
    """See `piflow.sharding.base.Strategy`."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Moves the module to the device."""
        module.to(self.device)

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """There is nobody to average with."""
        yield

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Clips to `max_norm` in place; returns the norm before (inf: only measures)."""
        return clip_grad_norm(parameters, max_norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU by name."""
        return gather(tensors, self.rank)
