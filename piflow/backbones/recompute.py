"""What a block's backward pass computes again instead of keeping (arXiv 1604.06174, 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

_aten = torch.ops.aten
# What takes most of a block's time: matrix products, and attention as each device computes it
KEPT = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


class Recomputing(nn.Module):
    """A model that this package rebuilds, whose blocks may be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self._checkpoint: Callable[..., Any] | None = None

    def enable_gradient_checkpointing(self, checkpoint: Callable[..., Any]) -> None:
        """Calls blocks by `checkpoint(block, ...)` where a backward pass will follow."""
        self._checkpoint = checkpoint

    def run(self, block: nn.Module, *inputs: Any, **options: Any) -> Any:
        """The block's output."""
        if self._checkpoint is not None and torch.is_grad_enabled():
            return self._checkpoint(block, *inputs, **options)
        return block(*inputs, **options)


def block_checkpoint(selective: bool) -> Callable[..., Any]:
    """A function (block, *arguments) -> the block's output, which keeps less for the backward pass.

    Args:
        selective: keep the outputs of matrix products and attention, and compute norms,
            activations and the like again; else keep the block's input alone.
    """
    if not selective:
        return partial(checkpoint, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _policy(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    kept = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
