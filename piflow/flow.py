"""The flow between data and noise: x_sigma = (1 - sigma) x0 + sigma eps, u = eps - x0.

Source: arXiv 2510.14974, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from piflow.policies.base import Policy, expand_as_latents, to_device, working_dtype

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, ...), sigma (B,)) -> u, as x."""
Student = Callable[[Tensor, Tensor], Policy]
"""(x (B, C, ...), sigma (B,)) -> the policy from there on: one network evaluation."""


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps.

    Exact at both ends: sigma = 0 gives x0 and sigma = 1 gives the noise, to the last bit.

    Args:
        x0, noise: (B, C, ...).
        sigma: (B,), noise levels.

    Returns:
        As x0, float32 (float64 if x0 or the noise is).

    Raises:
        ValueError: x0 and noise have different shapes.
    """
    if x0.shape != noise.shape:
        raise ValueError(
            f"expected x0 and noise of one shape, got {tuple(x0.shape)} and {tuple(noise.shape)}"
        )
    dtype = working_dtype(x0, noise)
    level = expand_as_latents(to_device(sigma, x0.device), x0).to(dtype)
    return (1 - level) * x0.to(dtype) + level * noise.to(dtype)


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers, float32, drawn on the generator's device and moved to `device`.

    A CPU generator so gives the same noise on every machine and accelerator.
    """
    drawn = torch.randn(*shape, generator=generator, device=generator.device)
    return to_device(drawn, device)
