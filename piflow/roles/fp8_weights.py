"""Where the 8-bit weights of a frozen base come from: quantised in each call, or once and kept.

    PerCall      base ── quantised ── product        nothing is kept, a pass over it in each call
    Kept         base ── quantised once ── codes     a byte a value beside the base, and a float32
                                                     scale a row
    KeptShards   own rows ── quantised once          the same of each worker's rows, which are
                 block i: codes of all workers       gathered in 8 bits, block by block, while the
                 block i + 1: on their way           block before computes

Each row has a scale of its own, so a worker's rows have the codes and scales that they have in the
whole weight, and all three give the same products to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from piflow.sharding.rows import ComingRows, RowsOfAll
from piflow.sharding.tensors import local_shard


class Scheme:
    """How torchao quantises weights and inputs: e4m3, a float32 scale a row, max |row| / 448.

    Raises:
        ValueError: torchao isn't installed.
    """

    def __init__(self) -> None:
        try:
            from torchao.float8.inference import Float8MMConfig
            from torchao.quantization import Float8Tensor, PerRow
            from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
        except ImportError as error:
            raise ValueError(
                f"model.fp8_teacher needs the package torchao ({error}): run "
                "`pip install 'piflow[lowbit]'`, or leave it out"
            ) from error
        config = Float8MMConfig(use_fast_accum=True)
        self._tensor: Any = Float8Tensor
        self._weights = {"granularity": PerRow(), "mm_config": config}
        self._weights["act_quant_kwargs"] = QuantizeTensorToFloat8Kwargs(
            granularity=PerRow(), mm_config=config
        )

    def quantised(self, weight: Tensor) -> Any:
        """`(N, K)` -> a tensor of torchao's, `qdata` `(N, K)` e4m3 and `scale` `(N, 1)`."""
        return self._tensor.from_hp(weight.detach(), **self._weights)

    def joined(self, like: Any, codes: Tensor, scales: Tensor) -> Any:
        """Codes `(N, K)` and scales `(N, 1)` as what `quantised` made of some of their rows."""
        return self._tensor(
            codes,
            scales,
            block_size=like.block_size,
            mm_config=like.mm_config,
            act_quant_kwargs=like.act_quant_kwargs,
            kernel_preference=like.kernel_preference,
            dtype=like.dtype,
        )


class Weights(Protocol):
    """What multiplies tokens by a layer's weight in 8 bits."""

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """`(..., K)` -> `(..., N)`, in the input's dtype."""
        ...

    def end(self) -> None:
        """A forward pass is over."""
        ...


class PerCall:
    """The layer's weight is quantised for the time of a product."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self._scheme.quantised(layer.weight), layer.bias)

    def end(self) -> None:
        return


class Kept:
    """A layer's weight is quantised at its first product; it must not change afterwards."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._codes: dict[nn.Module, Any] = {}

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if layer not in self._codes:
            self._codes[layer] = self._scheme.quantised(layer.weight)
        return F.linear(x, self._codes[layer], layer.bias)

    def end(self) -> None:
        return


class KeptShards:
    """Layers whose rows the workers have between them, as FSDP deals them out.

    Every product is a collective, in the blocks' order: at a block's first one its codes are waited
    for, and the next block's are sent for. The layers themselves aren't asked, so that nothing
    gathers them in the base's own precision.

    Args:
        blocks: each block's layers, in the order in which blocks are called.
        group: the workers that have a whole weight between them.
        device: where products are computed, and where codes are kept.
    """

    def __init__(
        self,
        scheme: Scheme,
        blocks: Sequence[Sequence[nn.Linear]],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._scheme = scheme
        self._blocks = blocks
        self._place = {
            layer: (b, i) for b, block in enumerate(blocks) for i, layer in enumerate(block)
        }
        self._group, self._device = group, device
        self._kept: list[RowsOfAll] = []
        self._like: Any = None
        self._coming: tuple[int, ComingRows] | None = None
        self._whole: tuple[int, list[tuple[Any, Tensor | None]]] | None = None

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if not self._kept:
            self._kept = [self._quantised(block) for block in self._blocks]
        number, position = self._place[layer]
        if self._whole is None or self._whole[0] != number:
            self._whole = None  # its memory is for the next
            self._whole = number, self._fetched(number)
        weight, bias = self._whole[1][position]
        return F.linear(x, weight, bias)

    def end(self) -> None:
        self._whole = None
        if self._coming is not None:  # a pass that an error ended
            self._coming[1].wait()
            self._coming = None

    def _quantised(self, block: Sequence[nn.Linear]) -> RowsOfAll:
        """This worker's rows of a block: codes, scales and biases."""
        parts: list[Tensor] = []
        rows: list[int] = []
        for layer in block:
            quantised = self._scheme.quantised(local_shard(layer.weight).to(self._device))
            self._like = quantised
            parts += [quantised.qdata, quantised.scale]
            if layer.bias is not None:
                parts.append(local_shard(layer.bias).to(self._device))
            rows += [layer.out_features] * (len(parts) - len(rows))
        return RowsOfAll(parts, rows, self._group)

    def _fetched(self, number: int) -> list[tuple[Any, Tensor | None]]:
        """A block's whole weights and biases; the next block's are on their way afterwards."""
        if self._coming is not None and self._coming[0] == number:
            coming = self._coming[1]
        else:
            self.end()
            coming = self._kept[number].start()
        following = number + 1
        self._coming = (
            (following, self._kept[following].start()) if following < len(self._kept) else None
        )
        tensors = iter(coming.wait())
        return [
            (
                self._scheme.joined(self._like, next(tensors), next(tensors)),
                None if layer.bias is None else next(tensors),
            )
            for layer in self._blocks[number]
        ]
