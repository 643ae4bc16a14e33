"""What is done ahead of a step or beside it: the next batch, and a checkpoint's copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from piflow.data.batch import MicroBatch, StreamBatch, conditioning, on_device
from piflow.sharding.side_stream import Mark, SideStream
from piflow.training.ahead import one_ahead
from piflow.training.snapshot import Copier

CPU = torch.device("cpu")


def test_the_next_item_is_prepared_when_one_is_handed_out() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(4):
            taken.append(number)
            yield number

    items = one_ahead(numbers(), lambda number: 10 * number)
    seen = [(item, len(taken)) for item in items]
    assert seen == [(0, 2), (10, 3), (20, 4), (30, 4)]


def test_an_error_comes_where_its_item_would_have() -> None:
    """The item before it isn't lost."""

    def numbers() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = one_ahead(numbers(), lambda number: number)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)

    def wrong(number: int) -> int:
        raise ValueError(f"{number} doesn't fit")

    with pytest.raises(ValueError, match="7 doesn't fit"):
        next(one_ahead(iter([7]), wrong))


class Late(SideStream):
    """Copies of a device that is behind: they are done when somebody waits for a mark."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queued: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def queue(self) -> Iterator[None]:
        with _Deferred(self.queued):
            yield

    def mark(self) -> Mark:
        stream, length = self, len(self.queued)

        class Place(Mark):
            def synchronize(self) -> None:
                nonlocal length
                done, stream.queued[:length] = stream.queued[:length], []
                length = 0
                for target, source in done:
                    target.copy_(source)

        return Place(None)


class _Deferred(TorchDispatchMode):
    def __init__(self, queued: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._queued = queued

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._queued.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stream", [SideStream(CPU), Late()], ids=["at once", "late"])
@pytest.mark.parametrize(
    "tensor",
    [torch.randn(7, 5), torch.randn(9).bfloat16(), torch.tensor(3.5), torch.randn(6, 4).T,
     torch.arange(300, dtype=torch.uint8), torch.empty(0, 3)],
    ids=["matrix", "bfloat16", "scalar", "strided", "bytes", "empty"],
)  # fmt: skip
def test_copies_through_two_small_buffers_are_true(stream: SideStream, tensor: Tensor) -> None:
    """No buffer is read before it is filled (late), nor filled before it was read (at once)."""
    copied = Copier(stream, buffer_bytes=16).to_host(tensor)
    assert torch.equal(copied, tensor) and copied.dtype == tensor.dtype
    assert copied.data_ptr() != tensor.data_ptr() or not tensor.numel()


class Seen(Mark):
    """Who waited for it, and for which tensors."""

    def __init__(self) -> None:
        super().__init__(None)
        self.tensors: list[Tensor] = []

    def wait_here(self, tensors: Any = ()) -> None:
        self.tensors += list(tensors)


class Marked(SideStream):
    def __init__(self) -> None:
        super().__init__(CPU)
        self.marks: list[Seen] = []

    def mark(self) -> Mark:
        self.marks.append(Seen())
        return self.marks[-1]


def test_what_was_brought_ahead_is_waited_for_and_used() -> None:
    """All of a micro-batch's tensors; a call for another device or another cut gets its own."""
    names = ("a", "b")
    tokens, counts = torch.randn(2, 64, 3), torch.tensor([5, 40])
    plain = MicroBatch(0, names, names, tokens, counts, torch.randn(2, 4), 8, 8, torch.randn(2, 1))
    stream = Marked()
    (brought,) = on_device(StreamBatch(0, [plain], {}), stream, 1).micro_batches
    (mark,) = stream.marks
    assert mark.tensors == []
    assert brought.there is not None and brought.there.cond.tokens.shape == (2, 64, 3)
    cond = conditioning(brought, CPU, shared_by=1)
    assert cond is brought.there.cond and cond.pooled is not None
    taken = [cond.tokens, cond.num_tokens, cond.pooled, brought.there.latents]
    assert all(mine is theirs for mine, theirs in zip(mark.tensors, taken, strict=True))
    expected = conditioning(plain, CPU, shared_by=1)
    assert torch.equal(cond.tokens, expected.tokens) and cond.full == expected.full
    assert conditioning(brought, CPU) is not cond
    assert conditioning(brought, torch.device("meta"), shared_by=1).tokens.is_meta
