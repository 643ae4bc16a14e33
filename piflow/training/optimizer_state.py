"""The tensors of an optimiser's state, to be saved and filled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from piflow.sharding.base import Strategy
from piflow.sharding.tensors import SplitTensor

MIN_BLOCK, MAX_BLOCK = 16, 256  # values that share one scale in 8-bit moments


class BlockwiseState(ABC):
    """An optimiser that keeps its state in another form than tensors shaped as the parameters."""

    @abstractmethod
    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Plain tensors that hold the state, sharded as the parameter; fill them to restore it."""


def state_tensors(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Mapping[str, Tensor]:
    """The tensors that hold a parameter's optimiser state, by key; empty before the first step."""
    if isinstance(optimizer, BlockwiseState):
        return optimizer.state_tensors(parameter)
    state: dict[str, Tensor] = optimizer.state.get(parameter, {})
    return state


def saved_state(
    strategy: Strategy, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Mapping[str, Tensor | SplitTensor]:
    """What a checkpoint holds of a trained parameter's optimiser state, by key."""
    split = strategy.split_state(optimizer, parameter)
    return state_tensors(optimizer, parameter) if split is None else split


def allocate_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, keys: Collection[str]
) -> None:
    """Zeros for those of `keys` that the optimiser has: it makes its state in the first step only.

    A resumed optimiser needs its state before that, to be filled.
    """
    if isinstance(optimizer, BlockwiseState):
        return  # has it from the beginning
    optimizer.state[parameter] = {
        key: torch.zeros(()) if key == "step" else torch.zeros_like(parameter, requires_grad=False)
        for key in _STATE_KEYS[type(optimizer)]
        if key in keys
    }


def block_size(parameter: Tensor) -> int:
    """Values of one row that share a scale: the largest power of two, at most MAX_BLOCK, dividing.

    Blocks never cross rows, so a shard of whole rows is a shard of whole blocks on any number of
    workers. 1 for vectors and scalars.
    """
    if parameter.ndim < 2 or parameter.numel() == 0:
        return 1
    row = parameter.numel() // parameter.shape[0]
    return min(row & -row, MAX_BLOCK)


_STATE_KEYS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}
