"""In which order FSDP is told to gather blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from piflow.sharding import FSDPStrategy


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """Two stacks, and a head that is sharded beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([Block(), Block()])
        self.second = nn.ModuleList([Block()])
        self.head = nn.Linear(4, 4)


@pytest.fixture
def one_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def told(classes: tuple[type[nn.Module], ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Module -> what is gathered ahead of it, forwards and backwards, by name."""
    model = Model()
    names = {module: name for name, module in model.named_modules()}
    forwards: dict[str, str] = {}
    backwards: dict[str, str] = {}

    def recording(pairs: dict[str, str]) -> Callable[[nn.Module, list[nn.Module]], None]:
        def record(module: nn.Module, ahead: list[nn.Module]) -> None:
            pairs[names[module]] = names[ahead[0]]

        return record

    with (
        mock.patch.object(FSDPModule, "set_modules_to_forward_prefetch", recording(forwards)),
        mock.patch.object(FSDPModule, "set_modules_to_backward_prefetch", recording(backwards)),
    ):
        FSDPStrategy(torch.device("cpu")).prepare(model, classes)
    return forwards, backwards


def test_each_block_has_the_next_one_gathered(one_worker: None) -> None:
    forwards, backwards = told((Block,))
    assert forwards == {"": "first.0", "first.0": "first.1", "first.1": "second.0"}
    assert backwards == {"": "second.0", "second.0": "first.1", "first.1": "first.0"}


def test_blocks_with_units_inside_keep_fsdps_own_order(one_worker: None) -> None:
    """But for the end, from which a backward pass starts: not with another role's head."""
    assert told((Block, nn.Linear)) == ({}, {"": "second.0"})
