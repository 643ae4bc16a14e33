"""A frozen base's linear layers with their weights in 8 or 4 bits, whole for one product at a time.

    weight (N, K), once    ──▶ codes and scales, kept
    input (..., K)         ──▶ whole weight ── product ── forgotten           forward
    gradient (..., N)      ──▶ whole weight ── the input's gradient           backward

Teacher, student and EMA share the codes, so to all of them the base is what the codes stand for:
values and gradients are those of a model that holds these values. LoRA, heads, norms and biases
keep their precision, and so does whatever is outside of the blocks.

torchao quantises: int8 with a float32 scale a row, max |row| / 127.5; nf4 (QLoRA, arXiv 2305.14314)
in blocks of 64 values, whose scales are themselves in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from piflow.config.model import BaseWeights

NF4_BLOCK = 64  # values that share a scale
_NF4_SCALES = 256  # scales that share a scale of their own, at most


@dataclass(frozen=True)
class Coded:
    """What a base became.

    Attributes:
        kind: of codes.
        layers: that are in them.
        bytes: of their codes and scales.
        before: of their weights until then.
        error: root of the sum of squared differences over that of squared weights.
    """

    kind: BaseWeights
    layers: int
    bytes: int
    before: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.layers} linear layers of the base in {self.kind}: {self.bytes / 1e9:.2f} GB in "
            f"place of {self.before / 1e9:.2f}, weights off by {self.error:.3g} (relative L2)"
        )


class CodedLinear(nn.Linear):
    """A linear layer without a weight, but with codes for one; made of a linear layer in place."""

    _names: tuple[str, ...]
    _whole: Callable[[dict[str, Tensor]], Tensor]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight `(N, K)` that the codes stand for."""
        return self._whole({name: self.get_buffer(name) for name in self._names}).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., K)` -> `(..., N)`."""
        return cast(Tensor, _Product.apply(input, self))


class _Product(torch.autograd.Function):
    """Keeps the layer for its backward pass, where autograd would keep the whole weight."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: CodedLinear) -> Tensor:
        context.layer = layer
        return F.linear(x, layer.whole(x.dtype), layer.bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.whole(gradient.dtype), None


@torch.no_grad()
def code_base(
    module: nn.Module,
    block_classes: tuple[type[nn.Module], ...],
    kind: BaseWeights,
    read: Callable[[str, Tensor], Tensor],
    *,
    device: torch.device | str,
) -> Coded:
    """Puts the weights of the blocks' linear layers into codes, one after the other.

    So no more than one of them is whole at a time, if they come without storage.

    Args:
        module: has its adapters already, which keep their precision.
        kind: of codes.
        read: name in `module`, and the parameter there -> its values, in the parameter's dtype.
        device: where codes are made and stay.

    Raises:
        ValueError: torchao isn't installed, or no layer's weight can be put into codes.
    """
    quantise = _quantiser(kind)
    named = dict(coded_linears(module, block_classes, kind))
    if not named:
        raise ValueError(
            f"model.base_weights = {kind}: no linear layer of the model's blocks has a multiple of "
            f"{NF4_BLOCK} values; leave it out"
        )
    size = before = 0
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for name, layer in named.items():
        parameter = layer.weight
        value = read(f"{name}.weight", parameter).to(device, parameter.dtype)
        before += value.nbytes
        _become(layer, quantise(value))
        off = (layer.whole(torch.float32) - value.float()).double().square().sum()
        squares += torch.stack([off, value.double().square().sum()])
        size += sum(layer.get_buffer(part).nbytes for part in layer._names)
    off_sum, whole_sum = squares.tolist()
    error = math.sqrt(off_sum / whole_sum) if whole_sum else 0.0
    if not math.isfinite(error):
        raise ValueError(f"model.base_weights = {kind}: the base has weights that aren't finite")
    return Coded(kind, len(named), size, before, error)


def coded_linears(
    module: nn.Module, block_classes: tuple[type[nn.Module], ...], kind: BaseWeights
) -> Iterator[tuple[str, Any]]:
    """Name and layer of every linear layer of a module's blocks whose weight can be in codes."""
    for place, block in module.named_modules():
        if isinstance(block, block_classes):
            for name, layer in block.named_modules():
                if type(layer) is nn.Linear and ".lora_" not in name:
                    if can_be_coded((layer.out_features, layer.in_features), kind):
                        yield f"{place}.{name}", layer


def can_be_coded(shape: tuple[int, ...], kind: BaseWeights) -> bool:
    """Whether a weight of this shape can be in codes."""
    return kind == "int8" or math.prod(shape) % NF4_BLOCK == 0


def coded_bytes(shape: tuple[int, ...], itemsize: int, kind: BaseWeights) -> int:
    """Bytes of a weight's codes and scales.

    Args:
        itemsize: bytes of one of its values before.
    """
    values = math.prod(shape)
    if kind == "int8":
        return values + 4 * shape[0]
    blocks = values // NF4_BLOCK
    table = 16 + 1  # those that codes stand for, and the scales' mean
    return values // 2 + blocks + itemsize * (blocks // math.gcd(blocks, _NF4_SCALES) + table)


_Codes = tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]
"""The tensors that stand for a weight, and what makes it of them again."""


def _become(layer: Any, codes: _Codes) -> None:
    """Turns a linear layer into a `CodedLinear`, which no longer holds its weight."""
    tensors, whole = codes
    layer.__class__ = CodedLinear
    del layer.weight
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor, persistent=False)
    layer._names, layer._whole = tuple(tensors), whole


def _quantiser(kind: BaseWeights) -> Callable[[Tensor], _Codes]:
    try:
        from torchao.quantization import Int8Tensor, NF4Tensor, PerRow
    except ImportError as error:
        raise ValueError(
            f"model.base_weights = {kind} needs the package torchao ({error}): run `pip install "
            "'piflow[lowbit]'`, or leave it out"
        ) from error

    def to_int8(weight: Tensor) -> _Codes:
        made: Any = Int8Tensor.from_hp(weight, PerRow())
        block, dtype = made.block_size, weight.dtype

        def whole(parts: dict[str, Tensor]) -> Tensor:
            found: Any = Int8Tensor(parts["codes"], parts["scales"], block, dtype)
            return cast(Tensor, found.dequantize())

        return {"codes": made.qdata, "scales": made.scale}, whole

    def to_nf4(weight: Tensor) -> _Codes:
        blocks = weight.numel() // NF4_BLOCK
        made: Any = NF4Tensor.from_tensor(
            weight.contiguous(), NF4_BLOCK, math.gcd(blocks, _NF4_SCALES)
        )
        names, context = made.__tensor_flatten__()
        shape, stride = made.shape, made.stride()

        def whole(parts: dict[str, Tensor]) -> Tensor:
            found: Any = NF4Tensor.__tensor_unflatten__(parts, context, shape, stride)
            return cast(Tensor, found.get_original_weight())

        return {name: getattr(made, name) for name in names}, whole

    return to_int8 if kind == "int8" else to_nf4
