"""What a sharding strategy is: how one module's training is spread over the workers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from piflow.sharding.tensors import Part, SplitTensor, clip_grad_norm, local_shard, part_of


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

    def part(self, tensor: Tensor) -> Part:
        """What this worker holds of a prepared parameter, and where in the whole it lies."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """The values of `part`, where nobody asks for their place."""
        ...

    def saved_parameter(self, parameter: Tensor) -> Tensor | SplitTensor:
        """What a checkpoint holds of a prepared parameter, trained or not."""
        ...

    def split_state(
        self, optimizer: Optimizer, parameter: nn.Parameter
    ) -> Mapping[str, SplitTensor] | None:
        """A trained parameter's optimiser state, by key, where the strategy has split it.

        None: the optimiser's own tensors are all of it, shaped and sharded as the parameter.
        """
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
        """The optimisers move the parameters where they are: there is nothing to take over."""
        return

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds up gradients; the last pass averages them over the workers."""
        with self.gradient_sync(last):
            loss.backward()

    def update(
        self, parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer], max_norm: float
    ) -> float:
        """Clips, then lets every optimiser step, unless the norm isn't finite."""
        norm = self.clip_grad_norm(parameters, max_norm)
        if math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        return norm

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Clips to `max_norm` in place; returns the global norm before (inf: only measures)."""
        return clip_grad_norm(parameters, max_norm)

    def part(self, tensor: Tensor) -> Part:
        """All of a whole tensor, or this worker's rows of one that torch shards."""
        return part_of(tensor)

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or its shard."""
        return local_shard(tensor)

    def saved_parameter(self, parameter: Tensor) -> Tensor:
        """The parameter itself: a checkpoint is read into it."""
        return parameter.detach()

    def split_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        """The optimiser holds it itself."""
        return


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
