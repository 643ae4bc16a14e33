"""A frozen base's matrix products in 8 bits, for one of its roles, beside the base itself.

    weight (N, K), rows n     ──┐  e4m3 codes and a float32 scale a row: max |row| / 448
                                ├─ product of codes, scaled by both, in the input's dtype
    tokens (..., L, K)        ──┘  the same a token

Where the weights' codes come from is said in `fp8_weights.py`; the other roles see the weights
themselves. torchao does both (arXiv 2209.05433 defines e4m3); on a CPU the same values go through
torch's own product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflow.roles.fp8_weights import Kept, KeptShards, PerCall, Scheme, Weights

_MULTIPLE = 16  # of rows and columns, which tensor cores ask for
_CAPABILITY = (8, 9)  # of a GPU that multiplies in fp8


class Fp8Linear(nn.Linear):
    """A layer whose product is in fp8 while `Fp8Linears` says so; made of a linear layer in place.

    Then the call doesn't reach the layer's hooks: nothing gathers a weight that isn't looked at.
    """

    fp8: Fp8Linears

    def __call__(self, x: Tensor) -> Tensor:
        """`(..., K)` -> `(..., N)`."""
        if self.fp8.bypasses(x):
            return self.fp8.weights.product(self, x)
        return cast(Tensor, super().__call__(x))

    def forward(self, input: Tensor) -> Tensor:
        """`(..., K)` -> `(..., N)`; in fp8 with what the hooks have made of the weight."""
        if self.fp8.computes(input):
            return self.fp8.weights.product(self, input)
        return super().forward(input)


class Fp8Linears:
    """The linear layers of a module's blocks, which compute in fp8 inside `active()`.

    Only what is applied to tokens does: layers on one vector a sample (adaptive norms) would gain
    nothing and lose most. Adapters, embedders and output layers keep their precision.

    Args:
        module: has its adapters already.
        keep: weights are quantised once, in the first forward pass.

    Raises:
        ValueError: torchao isn't installed.
    """

    def __init__(
        self, module: nn.Module, block_classes: tuple[type[nn.Module], ...], *, keep: bool = False
    ) -> None:
        self._scheme = Scheme()
        self._on = False
        self._allowed = True
        self._split = False
        self._blocks = _base_linears(module, block_classes)
        self.weights: Weights = Kept(self._scheme) if keep else PerCall(self._scheme)
        for block in self._blocks:
            for layer in block.values():
                _become(layer, self)

    def keep_shards(self, tokens: Collection[str]) -> None:
        """The weights will be split by rows: these layers' are quantised and gathered apart.

        Args:
            tokens: names of the layers that are applied to tokens, as in the module without
                adapters. All others keep their precision.
        """
        for block in self._blocks:
            for name in [n for n in block if n.replace(".base_layer", "") not in tokens]:
                block.pop(name).__class__ = nn.Linear
        self._blocks = [block for block in self._blocks if block]
        self._split = True

    @property
    def apart(self) -> tuple[type[nn.Module], ...]:
        """The class of layers that are split apart from their blocks, if any are."""
        return (Fp8Linear,) if self._split else ()

    def find_shards(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """After the layers were split: among whom, and where products are computed."""
        blocks = [list(block.values()) for block in self._blocks]
        self.weights = KeptShards(self._scheme, blocks, group, device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Products are in fp8 inside, unless `suspended`."""
        self._on = self._allowed
        try:
            yield
        finally:
            self._on = False
            self.weights.end()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """`active` does nothing inside."""
        before, self._allowed = self._allowed, False
        try:
            yield
        finally:
            self._allowed = before

    def computes(self, x: Tensor) -> bool:
        """Whether this input's product is in fp8."""
        return self._on and x.ndim > 2

    def bypasses(self, x: Tensor) -> bool:
        """Whether it is, and needs nothing of the layer's own weight."""
        return isinstance(self.weights, KeptShards) and self.computes(x)


def _become(layer: Any, linears: Fp8Linears) -> None:
    layer.__class__ = Fp8Linear
    layer.fp8 = linears


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


def _base_linears(
    module: nn.Module, block_classes: tuple[type[nn.Module], ...]
) -> list[dict[str, Any]]:
    """Each block's linear layers that aren't an adapter's, of sizes that fp8 can have, by name.

    Raises:
        ValueError: there is none.
    """
    blocks = []
    for place, block in module.named_modules():
        if isinstance(block, block_classes):
            layers = {
                f"{place}.{name}": layer
                for name, layer in block.named_modules()
                if type(layer) is nn.Linear and ".lora_" not in name and takes_fp8(layer)
            }
            blocks.append(layers)
    if not any(blocks):
        raise ValueError(
            f"model.fp8_teacher: no linear layer of the model's blocks has rows and columns in "
            f"multiples of {_MULTIPLE}; leave it out"
        )
    return blocks


def takes_fp8(layer: Any) -> bool:
    """Whether a linear layer has a size that fp8 can have."""
    sizes = layer.in_features, layer.out_features
    return all(size % _MULTIPLE == 0 for size in sizes)
