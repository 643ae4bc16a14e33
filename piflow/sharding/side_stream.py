"""Copies beside computation: a GPU's second queue, and how the first one waits for it.

    compute stream   step n ───────────────────────┐ step n + 1
    side stream          copies ── mark            │
                                     └─ wait_here ─┘ (the compute stream waits, the host doesn't)

A copy between host and GPU runs beside kernels only if it is in another stream, and if the host's
memory is pinned. What one stream made and another one uses needs two things: the user's stream
waits for the maker's mark; and the memory must not be given away, to the maker's stream, before the
user is done (`Tensor.record_stream`), since PyTorch's allocator knows of the maker's stream alone.

On a CPU there is one queue: copies are done when their call returns, and all waits are over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Mark:
    """A place in a side stream: what was queued before it."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait_here(self, tensors: Iterable[Tensor] = ()) -> None:
        """Whatever this thread's current stream is given from now on comes after the mark.

        Args:
            tensors: made in the side stream and used in this one.
        """
        if self._event is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self._event)
        for tensor in tensors:
            tensor.record_stream(stream)

    def synchronize(self) -> None:
        """The host waits until it is done."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """A second queue of a device; of a CPU, none.

    Args:
        device: of what is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """What is queued here from now on comes after all that the current stream has by now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Operations inside, of this thread, go to this stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """Of all that is queued here."""
        return Mark(None if self._stream is None else self._stream.record_event())

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory that this stream's copies can use while the host goes on."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)
