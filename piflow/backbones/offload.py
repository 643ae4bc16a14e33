"""Models that are larger than a GPU's memory, for inference: their weights come to it in parts."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

_log = logging.getLogger(__name__)

Offload = Literal["auto", "always", "never"]

_FREE_SHARE = 0.75  # of the memory that is free; the rest is for activations


def place(
    model: nn.Module, device: torch.device, name: str, offload: Offload = "auto"
) -> nn.Module:
    """Put a model on a device, whole, or in such a way that only the part at work is there.

    Offloaded weights stay in the host's memory. diffusers' hooks copy a block's (or layer's) to the
    GPU before it computes, on a stream of their own while the one before it still computes.

    Args:
        name: of the model, for the line that tells of offloading.
        offload: "auto" offloads a model whose weights take more than three quarters of the
            memory that is free on the GPU.

    Returns:
        `model`. Its inputs belong on `device` in either case.
    """
    weights = weight_bytes(model)
    if offload == "never" or (offload == "auto" and fits(weights, _free(device))):
        return model.to(device)
    _log.warning(
        "%s: its weights (%.1f GiB) stay in the host's memory and come to the GPU a part at a "
        "time, which is slower than on a GPU that holds them",
        name,
        weights / 2**30,
    )
    from diffusers.hooks import apply_group_offloading

    # By block where the model's own children are lists of blocks, since parts of a block read its
    # weights without calling the layer (LoRA does); a language model's layers lie deeper.
    by_block = any(isinstance(child, nn.ModuleList) for child in model.children())
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level" if by_block else "leaf_level",
        num_blocks_per_group=1 if by_block else None,
        use_stream=device.type == "cuda",
    )
    return model


def weight_bytes(model: nn.Module) -> int:
    """What parameters and buffers take, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fits(weights: int, free: int | None) -> bool:
    """Whether so many bytes of weights leave room for activations in so many free bytes.

    Args:
        free: None: the weights are where they belong already.
    """
    return free is None or weights <= _FREE_SHARE * free


def _free(device: torch.device) -> int | None:
    """Bytes that nobody holds on a GPU; None for the host."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what an encoder before it held isn't free until PyTorch lets it go
    return torch.cuda.mem_get_info(device)[0]
