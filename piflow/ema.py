"""Exponential moving averages of weights: the Karras power schedule, or a fixed beta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piflow.config import EMAConfig
from piflow.sharding.tensors import local_shard


def karras_beta(step: int, gamma: float = 7.0) -> float:
    """beta_t = (1 - 1/t)^(gamma + 1) (arXiv 2312.02696, the power-function average).

    Args:
        step: t >= 1, counted from the first averaged step; beta_1 = 0 copies the source.
        gamma: larger follows the source faster.

    Raises:
        ValueError: `step` < 1.
    """
    if step < 1:
        raise ValueError(
            f"karras_beta: expected step >= 1, counted from the start of averaging, got {step}"
        )
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def ema_beta(step: int, config: EMAConfig) -> float:
    """The old average's share in the update after optimiser step `step`, counted from 0.

    Before `config.start` 0, the average is a copy; from there `config.beta`, or without one the
    power schedule with t = 1 at `config.start`.
    """
    if step < config.start:
        return 0.0
    if config.beta is not None:
        return config.beta
    return karras_beta(step + 1 - config.start, config.gamma)


@torch.no_grad()
def ema_update(ema: Sequence[Tensor], source: Sequence[Tensor], beta: float) -> None:
    """ema <- beta ema + (1 - beta) source, in place.

    Args:
        ema, source: aligned tensors; of sharded ones only the local shards are touched.
            A source of another dtype is converted.
        beta: in [0, 1]; `karras_beta(t)` or a fixed number.

    Raises:
        ValueError: lengths or shapes differ, or beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"ema_update: expected beta in [0, 1], got {beta}")
    averages, values = [local_shard(t) for t in ema], [local_shard(t) for t in source]
    shapes, others = [t.shape for t in averages], [t.shape for t in values]
    if shapes != others:
        raise ValueError(
            f"ema_update: expected aligned tensors, got {len(shapes)} averages and {len(others)} "
            "sources that differ in number or shape; align them by parameter name"
        )
    if not averages:
        return
    converted = [value.to(mean) for mean, value in zip(averages, values, strict=True)]
    torch._foreach_lerp_(averages, converted, 1.0 - beta)
