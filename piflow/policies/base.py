"""What every policy is: a closed-form velocity field that needs no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

SIGMA_MIN = 1e-6
"""Divisions by sigma use max(sigma, SIGMA_MIN)."""


class Policy(Protocol):
    """A velocity field valid from its source time down (arXiv 2510.14974, section 3)."""

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """u = eps - x0 at latents `x` (B, C, ...) and noise levels `sigma` (B,)."""
        ...

    def detach(self) -> Self:
        """The same field without gradient."""
        ...


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 for half precision and float32 inputs, float64 if any input is float64."""
    dtype = torch.float32
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(
                f"expected floating-point tensors, got {tensor.dtype}; convert with .float()"
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def to_device(
    value: Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor on a device; the host doesn't wait for what the device is still computing.

    A copy to a GPU can only be queued from pinned memory, which PyTorch keeps until it is done.
    """
    device = torch.device(device)
    converted = value if dtype is None else value.to(dtype)
    if converted.device.type != "cpu" or device.type == "cpu":
        return converted.to(device)
    if device.type == "cuda":
        converted = converted.pin_memory()
    return converted.to(device, non_blocking=True)


def per_sample(value: Tensor, like: Tensor, name: str) -> Tensor:
    """Bring (B,) times to the device and dtype of `like` (B, ...), checked.

    Raises:
        ValueError: `value` isn't (B,).
    """
    if value.shape != like.shape[:1]:
        raise ValueError(
            f"{name}: expected shape ({like.shape[0]},), one value a sample, got "
            f"{tuple(value.shape)}; expand a scalar with torch.full"
        )
    return to_device(value, like.device, like.dtype)


def expand_as_latents(value: Tensor, latents: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply latents with."""
    return value.reshape(-1, *[1] * (latents.ndim - 1))


def recomputed(function: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
    """Call `function`; what it keeps for a backward pass is recomputed there instead of stored.

    `function` must be deterministic. Without gradient it is just called.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    result: Result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
