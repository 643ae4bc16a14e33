"""What a computation costs, counted as it runs without values on the meta device.

Every operation that PyTorch dispatches is seen once: its operations, the bytes that it reads and
writes, and the memory that it allocates. Memory is followed by storage, as an allocator sees it:
views cost nothing, and a storage is free again when its last tensor is.

    matmul      products of matrices, and convolutions
    attention   scaled dot products, as a fused kernel computes them
    other       all else: it moves bytes and computes little

The meta device takes attention apart into products of whole score matrices, which no GPU kernel
keeps. `fused_attention` puts PyTorch's own fused operation in its place, with what that one keeps
for its backward pass.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["matmul", "attention", "other"]

_aten = torch.ops.aten
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_backward,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_efficient_attention_backward,
    }
)
_COPIES_NOTHING = frozenset({_aten.detach, _aten.empty, _aten.empty_strided, _aten.empty_like})


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Attributes:
        kind: what it is limited by.
        dtype: of its factors, as torch calls it without the prefix.
        flops: operations of its products; 0 for `other`.
        moved: bytes that it reads and writes.
    """

    kind: Kind
    dtype: str
    flops: int
    moved: int


@dataclass(eq=False)
class Span:
    """Live bytes at the start, at most and at the end of a part of a computation."""

    start: int
    peak: int
    end: int = 0


@dataclass
class Counts:
    """What one run came to.

    Attributes:
        operations: phase -> kernels and how many times each.
        spans: phase -> its live bytes, where it ran several times those of the last.
    """

    operations: dict[str, Counter[Operation]] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """Counts what is dispatched inside; tensors that were there before cost nothing.

    `phase` names the part of the computation that runs; a phase within a phase is its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.live = 0
        self._phase = "rest"
        self._alive: set[int] = set()
        self._open: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[Span]:
        """What runs inside is counted under `name`."""
        before, self._phase = self._phase, name
        span = Span(self.live, self.live)
        self._open.append(span)
        try:
            yield span
        finally:
            self._open.remove(span)
            self._phase = before
            span.end = self.live
            self.counts.spans[name] = span

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {_key(tensor) for tensor in given}
        fresh = [tensor for tensor in made if _key(tensor) not in known]
        for tensor in fresh:
            self._follow(tensor)
        writes_in_place = func._schema.is_mutable
        if packet not in _COPIES_NOTHING and (fresh or writes_in_place):
            self._count(packet, args, kwargs or {}, out, given, fresh)
        return out

    def _count(
        self, packet: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        kind: Kind = "other"
        flops = 0
        if packet in flop_registry:
            kind = "attention" if packet in _ATTENTION else "matmul"
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        moved = sum(map(_bytes, given)) + sum(map(_bytes, made))
        dtype = (given or made)[0].dtype
        operation = Operation(kind, str(dtype).removeprefix("torch."), flops, moved)
        self.counts.operations.setdefault(self._phase, Counter())[operation] += 1

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.live += size
        for span in self._open:
            span.peak = max(span.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """Of the values that are there: those that an expanded view repeats are read once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention inside is PyTorch's fused one: flash, or with a mask the memory-efficient kernel.

    It holds for all of the process while it lasts. (A mode for functions wouldn't do: PyTorch turns
    it off within a backward pass, in which blocks are computed again.)
    """
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
    if attn_mask is None:
        flash = _aten._scaled_dot_product_flash_attention
        out: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out
    bias = attn_mask
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(bias, -torch.inf)
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    keeps = torch.is_grad_enabled()
    efficient = _aten._scaled_dot_product_efficient_attention
    out = efficient(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)[0]
    return out
