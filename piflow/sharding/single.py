"""One process: nothing is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from piflow.sharding.base import InPlaceStrategy


class SingleStrategy(InPlaceStrategy):
    """The one worker holds everything, and its gradients are the mean already."""

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
