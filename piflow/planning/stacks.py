"""A module's stacks of blocks, which blocks of them are alike, and what is applied to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from piflow.backbones.transformer import TransformerBackbone

_TEXT_TOKENS = 4  # of a pass that tells shapes


def block_stacks(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> list[nn.ModuleList]:
    """The module's lists of blocks."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [part for part in lists if len(part) and all(isinstance(m, classes) for m in part)]


def form_of(block: nn.Module) -> tuple[object, ...]:
    """What makes two blocks cost the same."""
    return (type(block), *((name, tuple(p.shape)) for name, p in block.named_parameters()))


def set_blocks(stack: nn.ModuleList, blocks: Sequence[nn.Module]) -> None:
    """These blocks in place of the stack's."""
    while len(stack):
        del stack[-1]
    stack.extend(blocks)


def token_linears(backbone: TransformerBackbone, latents: tuple[int, int]) -> frozenset[str]:
    """Names of the linear layers in blocks that are applied to tokens, and not to one vector a
    sample.

    A forward pass without values tells, of one block of each form. Layers outside of stacks are
    left out.

    Args:
        backbone: without adapters, on "meta"; it is taken over.
        latents: height and width of a picture in latent pixels.
    """
    module = backbone.module
    whole = [(stack, list(stack)) for stack in block_stacks(module, backbone.block_classes)]
    seen: set[nn.Module] = set()

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].ndim > 2:
            seen.add(layer)

    for stack, blocks in whole:
        firsts: dict[object, nn.Module] = {}
        for block in blocks:
            firsts.setdefault(form_of(block), block)
        set_blocks(stack, list(firsts.values()))
        for block in firsts.values():
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(look)
    nn.Module.to(module, "meta")  # tables of positions have values
    with torch.no_grad(), torch.device("meta"):
        x = torch.empty(1, backbone.latent_channels, *latents)
        cond = backbone.blank_conditioning(_TEXT_TOKENS)
        cond = cond.editing(backbone.blank_condition(*latents))
        backbone.teacher_velocity(x, torch.ones(1), cond)
    inner = {
        form_of(block): {name for name, layer in block.named_modules() if layer in seen}
        for _, blocks in whole
        for block in blocks
        if any(layer in seen for layer in block.modules())
    }
    for stack, blocks in whole:
        set_blocks(stack, blocks)
    return frozenset(
        f"{place}.{name}"
        for place, block in module.named_modules()
        if isinstance(block, backbone.block_classes)
        for name in inner.get(form_of(block), ())
    )
