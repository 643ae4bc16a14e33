"""What a sharding strategy is: how one module's training is spread over the workers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from piflow.sharding.tensors import SplitTensor, clip_grad_norm, gather
from piflow.training import optimizer_state


class Strategy(Protocol):
    """Prepares the modules and trains them; then answers for whole tensors.

    The workers' gradients are averaged. Every method is a collective: all workers call it.

    Attributes:
        rank: this worker, from 0.
        world_size: all workers.
        device: this worker's device.
        splits_frozen: whether `prepare` splits weights that aren't trained, too: these may then
            come without storage ("meta"), to be filled afterwards (`piflow.sharding.weights.fill`).
    """

    rank: int
    world_size: int
    device: torch.device
    splits_frozen: bool

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Moves the module to the device and shards it in place, block by block.

        May be called for several modules; `backward` is about all of them.
        """
        ...

    def adopt(self, optimizers: Sequence[Optimizer]) -> None:
        """Takes over what moves the prepared modules' parameters; called once, before training."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a part of a step's loss to the gradients.

        Args:
            loss: a scalar with gradient.
            last: the step's last part: gradients are then averaged over the workers.
        """
        ...

    def update(
        self, parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer], max_norm: float
    ) -> float:
        """Moves the parameters once: gradients are clipped to `max_norm` (inf: not clipped).

        Returns:
            the global gradient norm before clipping. If it isn't finite, nothing was moved.
        """
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name on rank 0; an empty dict on the others."""
        ...

    def saved_parameter(self, parameter: Tensor) -> Tensor | SplitTensor:
        """What a checkpoint holds of a prepared parameter, trained or not."""
        ...

    def saved_state(
        self, optimizer: Optimizer, parameter: nn.Parameter
    ) -> Mapping[str, Tensor | SplitTensor]:
        """The same of a trained parameter's optimiser state, by key; may be empty at first."""
        ...

    def allocate_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, keys: Collection[str]
    ) -> None:
        """Makes the optimiser's state of those `keys` that it has, to be filled."""
        ...


class InPlaceStrategy(ABC):
    """What strategies have in common whose gradients and states lie where torch puts them.

    That is `parameter.grad` and `optimizer.state`, of whole tensors or DTensors.
    """

    rank: int
    world_size: int
    device: torch.device
    splits_frozen = False

    @abstractmethod
    def gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Whether backward passes inside average gradients over the workers, or only add up."""

    def adopt(self, optimizers: Sequence[Optimizer]) -> None:
        """See `Strategy`; there is nothing to do."""
        return

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        with self.gradient_sync(last):
            loss.backward()

    def update(
        self, parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer], max_norm: float
    ) -> float:
        """See `Strategy`."""
        norm = self.clip_grad_norm(parameters, max_norm)
        if math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        return norm

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Clips to `max_norm` in place; returns the global norm before (inf: only measures)."""
        return clip_grad_norm(parameters, max_norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Strategy`."""
        return gather(tensors, self.rank)

    def saved_parameter(self, parameter: Tensor) -> Tensor | SplitTensor:
        """The parameter itself: a checkpoint is read into it."""
        return parameter.detach()

    def saved_state(
        self, optimizer: Optimizer, parameter: nn.Parameter
    ) -> Mapping[str, Tensor | SplitTensor]:
        """The optimiser's own tensors."""
        return optimizer_state.state_tensors(optimizer, parameter)

    def allocate_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, keys: Collection[str]
    ) -> None:
        """See `Strategy`."""
        optimizer_state.allocate_state(optimizer, parameter, keys)


def require_process_group(strategy: str) -> tuple[int, int]:
    """This worker's rank and the number of workers.

    Raises:
        ValueError: no process group is up.
    """
    if not dist.is_initialized():
        raise ValueError(
            f"runtime.strategy {strategy} needs a process group: start the workers with Ray Train "
            "or torchrun, or use runtime.strategy: single with one worker"
        )
    return dist.get_rank(), dist.get_world_size()
