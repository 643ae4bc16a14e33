"""What a sharding strategy is: how one module's training is spread over the workers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from piflow import optimizers as states


class SplitTensor(Protocol):
    """A tensor whose parts the workers hold in a form that torch's own checkpoints can't name.

    Attributes:
        shape: of the whole tensor.
        dtype: of its values.
    """

    shape: torch.Size
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """All of it, on the workers' devices; a collective. Copy it before anything trains on."""
        ...

    def fill(self, whole: Tensor) -> None:
        """Sets this worker's part from all of it; no collective."""
        ...


class Strategy(Protocol):
    """Prepares the modules and trains them; then answers for whole tensors.

    The workers' gradients are averaged. Every method is a collective: all workers call it.

    Attributes:
        rank: this worker, from 0.
        world_size: all workers.
        device: this worker's device.
        splits_frozen: whether `prepare` splits weights that aren't trained, too: these may then
            come without storage ("meta"), to be filled afterwards (`piflow.weights.fill`).
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
        return states.state_tensors(optimizer, parameter)

    def allocate_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, keys: Collection[str]
    ) -> None:
        """See `Strategy`."""
        states.allocate_state(optimizer, parameter, keys)


def local_shard(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor, sharing its memory, without gradient history."""
    detached = tensor.detach()
    if isinstance(detached, DTensor):
        return detached.to_local()
    if is_partitioned(tensor):
        part: Tensor = tensor.ds_tensor.detach()
        return part
    return detached


def is_partitioned(tensor: Any) -> TypeGuard[Any]:
    """Whether DeepSpeed's stage 3 has split it.

    The parameter itself is empty then. This worker's part hangs on it as `ds_tensor`, flat, of
    equal size on all workers; the last one's end is padding.
    """
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Tensor) -> torch.Size:
    """A tensor's shape, also where DeepSpeed has only left its parts."""
    shape: torch.Size = tensor.ds_shape if is_partitioned(tensor) else tensor.shape
    return shape


def first_value(parameter: Any) -> int:
    """Number of the first value, in row-major order, of this worker's part (`is_partitioned`)."""
    first: int = parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
    return first


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """`InPlaceStrategy.clip_grad_norm`, of whole or sharded parameters.

    Those without gradient count 0.
    """
    trained = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if math.isfinite(max_norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def gather(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """`Strategy.gather` of whole or sharded tensors, one at a time."""
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        detached = tensor.detach()
        whole = detached.full_tensor() if isinstance(detached, DTensor) else detached
        if rank == 0:
            gathered[name] = whole.cpu().clone()
    return gathered


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
