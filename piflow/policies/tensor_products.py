"""Products of a table (B, K, C, P) with vectors over its channels or its components.

The table is read once and never copied into another layout, which is what `einsum` would do on the
way to a batched matrix product of tiny matrices. Large products run slice by slice into one
accumulator, small ones as one broadcast product and a sum (measured in benchmarks/policy.py).
None of these functions records a gradient: `piflow.policies.euler` has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE_ELEMENTS = 2**16
"""On the CPU, slices of this many elements outweigh the cost of calling one operation for each."""


def contract_channels(table: Tensor, vector: Tensor) -> Tensor:
    """sum_c table[b,k,c,p] vector[b,c,p]: (B, K, C, P), (B, C, P) -> (B, K, P)."""
    if not _slices_pay(table[:, :, 0]):
        return (table * vector.unsqueeze(1)).sum(2)
    first, *channels = zip(table.unbind(2), vector.unsqueeze(1).unbind(2), strict=True)
    total = first[0] * first[1]
    for channel, value in channels:
        total.addcmul_(channel, value)
    return total


def mix_components(table: Tensor, weights: Tensor) -> Tensor:
    """sum_k table[b,k,c,p] weights[b,k,p]: (B, K, C, P), (B, K, P) -> (B, C, P)."""
    if not _slices_pay(table[:, 0]):
        return (table * weights.unsqueeze(2)).sum(1)
    first, *components = zip(table.unbind(1), weights.unsqueeze(2).unbind(1), strict=True)
    total = first[0] * first[1]
    for component, weight in components:
        total.addcmul_(component, weight)
    return total


def add_outer_products(
    table: Tensor, pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """table[b,k,c,p] += weights[b,k,p] vector[b,c,p], in place, for both (weights, vector)."""
    if not _slices_pay(table[:, :, 0]):
        for weights, vector in pairs:
            table.addcmul_(weights.unsqueeze(2), vector.unsqueeze(1))
        return
    for channel in range(table.shape[2]):
        for weights, vector in pairs:
            table[:, :, channel].addcmul_(weights, vector[:, None, channel])


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """sum over everything but the batch of left * right: (B, ...), (B, ...) -> (B,)."""
    return torch.matmul(left.flatten(1).unsqueeze(1), right.flatten(1).unsqueeze(2)).flatten()


def _slices_pay(slice_of_table: Tensor) -> bool:
    return not slice_of_table.is_cuda and slice_of_table.numel() >= _SLICE_ELEMENTS
