"""What a checkpoint holds, copied to host memory while the next step computes.

    train thread    step s │ Snapshot │ step s + 1: forward, backward │ wait │ update │ ...
    writer thread               copy ───────────────────── done ───────┘

Between two updates nothing changes weights, averages and the optimiser's state, so the next update
is all that has to wait, and by then the copies are long done. They go through two small pinned
buffers: to pin all of a checkpoint would take as much host memory for good, since PyTorch keeps
what it has pinned. What DeepSpeed splits comes together by collectives, at once.
"""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from piflow.sharding.side_stream import Mark, SideStream
from piflow.sharding.tensors import SplitTensor
from piflow.training.optimizer_state import saved_state
from piflow.training.step import Trainer

_BUFFER_BYTES = 2**26


def saved_tensors(trainer: Trainer) -> dict[str, Tensor | SplitTensor]:
    """Flat names -> the trainer's own tensors (sharded where it is sharded)."""
    tree: dict[str, Tensor | SplitTensor] = {}
    strategy = trainer.strategy
    for name, parameter in trainer.parameters.items():
        tree[f"trainable.{name}"] = strategy.saved_parameter(parameter)
        state = saved_state(strategy, trainer.optimizer_of(parameter), parameter)
        for key, value in state.items():
            tree[f"optimizer.{name}.{key}"] = value
    for name, tensor in trainer.ema_parameters.items():
        tree[f"ema.{name}"] = strategy.saved_parameter(tensor)
    return tree


class Snapshot:
    """Everything that is saved, as it is when this is made: this worker's share, by flat name.

    Of what torch shards that is this worker's shards. What is split otherwise comes together whole,
    one tensor after the other, each on one worker, so that all have about as many bytes. Making one
    is a collective. The trainer's next update waits until `copy` is done, which another thread may
    call; one that is never copied holds it up for ever.

    Attributes:
        waited: seconds that the update had to wait.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.waited = 0.0
        self._stream = SideStream(trainer.strategy.device)
        self._done = threading.Event()
        self._tensors: dict[str, Tensor] = {}
        held = [0] * trainer.strategy.world_size  # bytes, by worker
        for name, tensor in saved_tensors(trainer).items():
            if isinstance(tensor, Tensor):
                self._tensors[name] = tensor
                continue
            owner = held.index(min(held))
            held[owner] += tensor.shape.numel() * tensor.dtype.itemsize
            whole = tensor.whole()
            if owner == trainer.strategy.rank:
                self._tensors[name] = whole.to("cpu", copy=True)
        self._stream.follow()  # the last update
        trainer.before_update(self._wait)

    @torch.no_grad()
    def copy(self) -> dict[str, Tensor]:
        """The copies; once."""
        try:
            copier = Copier(self._stream)
            return {name: _copied(tensor, copier) for name, tensor in self._tensors.items()}
        finally:
            self._tensors = {}
            self._done.set()

    def _wait(self) -> None:
        began = time.perf_counter()
        self._done.wait()
        self.waited = time.perf_counter() - began


class Copier:
    """Copies tensors to host memory through two pinned buffers, by a side stream.

    While one buffer is filled by the device, the host empties the other.
    """

    def __init__(self, stream: SideStream, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._stream = stream
        self._size = buffer_bytes
        self._buffers = [stream.buffer(buffer_bytes) for _ in range(2)]

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy, done when this returns."""
        if tensor.device.type == "cpu" and self._stream.device.type != "cpu":
            return tensor.clone()  # it was offloaded
        with self._stream.queue():
            content = tensor.detach().contiguous().flatten().view(torch.uint8)
        out = torch.empty(len(content), dtype=torch.uint8)
        filled: tuple[Tensor, Tensor, Mark] | None = None
        for number, target in enumerate(out.split(self._size)):
            buffer = self._buffers[number % 2][: len(target)]
            first = number * self._size
            with self._stream.queue():
                buffer.copy_(content[first : first + len(target)], non_blocking=True)
            mark = self._stream.mark()
            if filled is not None:
                _emptied(*filled)
            filled = target, buffer, mark
        if filled is not None:
            _emptied(*filled)
        return out.view(tensor.dtype).view(tensor.shape)


def _emptied(target: Tensor, buffer: Tensor, mark: Mark) -> None:
    mark.synchronize()
    target.copy_(buffer)


def _copied(tensor: Tensor, copier: Copier) -> Tensor:
    if not isinstance(tensor, DTensor):
        return copier.to_host(tensor)
    return DTensor.from_local(
        copier.to_host(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
