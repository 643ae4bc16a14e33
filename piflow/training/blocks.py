"""What a recipe does to a model's blocks before they are sharded: recomputation, compilation.

Blocks of a kind share their compiled code: its number doesn't grow with the model. A kind has one
piece for each role that calls it and for each way in which gradients flow (a first block's input
has none). A second picture size makes each again, for any size; further sizes make none.

What hangs on a block from outside (gathering its weights, computing it again) stays outside of the
compiled code, so strategies see the blocks that they always see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from piflow.backbones.base import Backbone
from piflow.config import RuntimeConfig

# Pieces of one block's code. Beyond torch's own limit, 8, a block would quietly run uncompiled:
# three roles, twice the batch under guidance, and any size come to more.
_LIMIT = 64


def prepare_blocks(
    runtime: RuntimeConfig,
    trained: Backbone,
    modules: Iterable[nn.Module],
    *,
    backend: str = "inductor",
) -> None:
    """Blocks as the recipe wants them; once the modules have all their parts, before sharding.

    Args:
        trained: has the backward pass that may compute its blocks again.
        modules: all that have its kinds of blocks, to be compiled.
        backend: of `torch.compile`.
    """
    if runtime.activation_checkpointing != "none":
        selective = runtime.activation_checkpointing == "selective"
        trained.enable_gradient_checkpointing(selective=selective)
    if runtime.compile:
        for module in modules:
            _compile(module, trained.block_classes, backend)


def _compile(module: nn.Module, block_classes: tuple[type[nn.Module], ...], backend: str) -> None:
    """Every block's forward pass, each at its first call."""
    torch._dynamo.config.recompile_limit = max(_LIMIT, torch._dynamo.config.recompile_limit)
    blocks: list[Any] = [block for block in module.modules() if isinstance(block, block_classes)]
    # LoRA dropout as without compilation: from torch's generator, value for value
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, options=options)
