"""Exponential moving averages of weights: the Karras power schedule, or a fixed beta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def ema_beta(step: int, *, start: int, gamma: float = 7.0, beta: float | None = None) -> float:
    """The old average's share in the update after optimiser step `step`, counted from 0.

    Before `start` it is 0: the average is a copy of the weights.

    Args:
        start: optimiser step at which averaging starts, t = 1 of the power schedule.
        gamma: of the power schedule.
        beta: a fixed share in the power schedule's place.
    """
    if step < start:
        return 0.0
    if beta is not None:
        return beta
    return karras_beta(step + 1 - start, gamma)


@torch.no_grad()
def ema_update(ema: Sequence[Tensor], source: Sequence[Tensor], beta: float) -> None:
    """ema <- beta ema + (1 - beta) source, in place.

    Args:
        ema, source: aligned plain tensors; of sharded ones this worker's shards
            (`piflow.sharding.tensors.local_shard`). A source of another dtype is converted.
        beta: in [0, 1], such as `ema_beta` gives.

    Raises:
        ValueError: lengths or shapes differ, or beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"ema_update: expected beta in [0, 1], got {beta}")
    shapes, others = [t.shape for t in ema], [t.shape for t in source]
    if shapes != others:
        raise ValueError(
            f"ema_update: expected aligned tensors, got {len(shapes)} averages and {len(others)} "
            "sources that differ in number or shape; align them by parameter name"
        )
    if not ema:
        return
    converted = [value.to(mean) for mean, value in zip(ema, source, strict=True)]
    # lerp moves by (1 - beta)(source - ema): an average that equals its source stays it exactly.
    torch._foreach_lerp_(list(ema), converted, 1.0 - beta)
