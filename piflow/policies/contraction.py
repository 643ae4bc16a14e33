"""Inner products and mixtures over (components, channels, pixels), with lean gradients.

`contract_channels` and `mix_components` are each other's gradients. Both read their large operand
once and make no copy of it in another layout, which is what `einsum` would do on the way to a
batched matrix product of tiny matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CACHED_ELEMENTS = 2**20
"""On the CPU, products of up to this many elements stay in cache; larger ones are accumulated."""


def contract_channels(table: Tensor, vector: Tensor) -> Tensor:
    """sum_c table[b,k,c,p] vector[b,c,p]: (B, K, C, P), (B, C, P) -> (B, K, P)."""
    result: Tensor = _ContractChannels.apply(table, vector)
    return result


def mix_components(table: Tensor, weights: Tensor) -> Tensor:
    """sum_k table[b,k,c,p] weights[b,k,p]: (B, K, C, P), (B, K, P) -> (B, C, P)."""
    result: Tensor = _MixComponents.apply(table, weights)
    return result


def _contract(table: Tensor, vector: Tensor) -> Tensor:
    if table.is_cuda or table.numel() <= _CACHED_ELEMENTS:
        return (table * vector.unsqueeze(1)).sum(2)
    first, *channels = zip(table.unbind(2), vector.unsqueeze(1).unbind(2), strict=True)
    total = first[0] * first[1]
    for channel, value in channels:
        total.addcmul_(channel, value)
    return total


def _mix(table: Tensor, weights: Tensor) -> Tensor:
    if table.is_cuda or table.numel() <= _CACHED_ELEMENTS:
        return (table * weights.unsqueeze(2)).sum(1)
    first, *components = zip(table.unbind(1), weights.unsqueeze(2).unbind(1), strict=True)
    total = first[0] * first[1]
    for component, weight in components:
        total.addcmul_(component, weight)
    return total


class _ContractChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, vector: Tensor) -> Tensor:
        ctx.save_for_backward(table, vector)
        return _contract(table, vector)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        table, vector = ctx.saved_tensors
        return (
            grad.unsqueeze(2) * vector.unsqueeze(1) if ctx.needs_input_grad[0] else None,
            _mix(table, grad) if ctx.needs_input_grad[1] else None,
        )


class _MixComponents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, weights)
        return _mix(table, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        table, weights = ctx.saved_tensors
        return (
            weights.unsqueeze(2) * grad.unsqueeze(1) if ctx.needs_input_grad[0] else None,
            _contract(table, grad) if ctx.needs_input_grad[1] else None,
        )
