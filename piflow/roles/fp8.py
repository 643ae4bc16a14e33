"""A frozen base's matrix products in 8 bits, for one of its roles, with one copy of its weights.

    weight (N, K), rows n     ──┐  e4m3 codes and a float32 scale a row: max |row| / 448
                                ├─ product of codes, scaled by both, in the input's dtype
    tokens (..., L, K)        ──┘  the same a token

A weight is quantised again in every call, for the time of the call: nothing is kept, so the base
costs no byte more, shards stay as they are, and the other roles see the weights themselves. It
costs one pass over the weight, which the product of a few thousand tokens outweighs. torchao does
both (arXiv 2209.05433 defines e4m3); on a CPU the same values go through torch's own product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MULTIPLE = 16  # of rows and columns, which tensor cores ask for
_CAPABILITY = (8, 9)  # of a GPU that multiplies in fp8


class Fp8Linears:
    """The linear layers of a module's blocks, which compute in fp8 inside `active()`.

    Only what is applied to tokens does: layers on one vector a sample (adaptive norms) would gain
    nothing and lose most. Adapters, embedders and output layers keep their precision.

    Args:
        module: has its adapters already.

    Raises:
        ValueError: torchao isn't installed.
    """

    def __init__(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        self._linear = _torchao_linear()
        self._on = False
        self._allowed = True
        for layer in _base_linears(module, block_classes):
            layer.forward = _Forward(self, layer)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Products are in fp8 inside, unless `suspended`."""
        self._on = self._allowed
        try:
            yield
        finally:
            self._on = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """`active` does nothing inside."""
        before, self._allowed = self._allowed, False
        try:
            yield
        finally:
            self._allowed = before

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`(..., K)`, `(N, K)`, `(N,)` -> `(..., N)`."""
        if self._on and x.ndim > 2:
            return self._linear(x, weight, bias)
        return F.linear(x, weight, bias)


class _Forward:
    """A layer's forward pass, which asks whether fp8 is on."""

    def __init__(self, linears: Fp8Linears, layer: nn.Linear) -> None:
        self._linears = linears
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self._linears.product(x, self._layer.weight, self._layer.bias)


class TeacherPrecisionError(ArithmeticError):
    """The fp8 teacher is further off than the recipe allows."""


def check_error(step: int, error: float, most: float) -> None:
    """Refuses a teacher whose velocity is more than `most` off, or isn't finite.

    Raises:
        TeacherPrecisionError: it is.
    """
    if not error <= most:
        raise TeacherPrecisionError(
            f"step {step}: the fp8 teacher's velocity is off by {error:.3g} (relative L2), "
            f"model.fp8_teacher.max_error is {most}. Checkpoints up to here were trained within "
            "it; set model.fp8_teacher to null, or allow more"
        )


def check_device(device: torch.device) -> None:
    """Refuses GPUs without fp8.

    Raises:
        ValueError: the device is one.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            "model.fp8_teacher needs a GPU of compute capability 8.9 or more (L4, H100), this one "
            f"has {have}; leave it out"
        )


@torch.no_grad()
def velocity_error(
    velocity: Callable[[Tensor, Tensor], Tensor],
    reference: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """Squared distance and squared length along the reference's Euler steps.

    Args:
        velocity, reference: `(B, C, H, W)`, `(B,)` -> `(B, C, H, W)`.
        x: `(B, C, H, W)` latents at `sigmas[0]`.
        sigmas: falling noise levels; both are called at all but the last.

    Returns:
        `(2,)` float64: the sums of |velocity - reference|² and |reference|². The relative L2 error
        is the root of their ratio; sums of several workers add up.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        levels = torch.full(x.shape[:1], sigma, device=x.device)
        exact = reference(x, levels)
        off = velocity(x, levels).double() - exact.double()
        sums += torch.stack([off.square().sum(), exact.double().square().sum()])
        x = x + (following - sigma) * exact
    return sums


def _base_linears(module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> list[Any]:
    """Linear layers inside of blocks that aren't an adapter's, of sizes that fp8 can have."""
    layers = {
        layer: None
        for block in module.modules()
        if isinstance(block, block_classes)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }
    fitting = [
        layer
        for layer in layers
        if layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
    ]
    if not fitting:
        raise ValueError(
            f"model.fp8_teacher: no linear layer of the model's blocks has rows and columns in "
            f"multiples of {_MULTIPLE}; leave it out"
        )
    return fitting


def _torchao_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`F.linear` with weight and input quantised by rows."""
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
    inputs = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), mm_config=config)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        quantised: Any = Float8Tensor.from_hp(
            weight.detach(), granularity=PerRow(), mm_config=config, act_quant_kwargs=inputs
        )
        return F.linear(x, quantised, bias)

    return linear
