"""Which kernel computes a model's attention, through diffusers' dispatcher.

A kernel is chosen once, for all calls of all roles: one that changed between a block's forward pass
and its recomputation in the backward pass would have kept other tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from piflow.config import Recipe, find_family

_PACKAGES = {"flash": ("flash_attn", "flash-attn")}  # kernel -> module, and what to install
_CUDNN_FROM = (9, 0)  # Hopper: there cuDNN's kernels are made for the tensor cores' own pipeline


def choose_attention(
    recipe: Recipe, capability: tuple[int, int] | None, *, dispatched: bool
) -> tuple[str, str]:
    """The kernel that the recipe asks for or, under auto, the one that fits.

    Args:
        capability: of the GPU; None on a CPU.
        dispatched: whether diffusers lets this model's attention be chosen.

    Returns:
        its name in diffusers, without a leading underscore, and the reason for the run's log.

    Raises:
        ValueError: a kernel that needs a package which isn't installed, or another model.
    """
    asked, family = recipe.runtime.attention, recipe.model.family
    if asked != "auto":
        _require_package(asked)
        if asked != "native" and not dispatched:
            raise ValueError(
                f"runtime.attention = {asked}: diffusers doesn't dispatch the attention of "
                f"model.family = {family}, which calls PyTorch's; use auto or native"
            )
        return asked, f"{asked}: runtime.attention says so"
    if capability is None:
        return "native", "native: PyTorch chooses, there is no GPU"
    if not dispatched:
        return "native", f"native: diffusers lets nobody choose for {family}"
    if recipe.model.dtype != "bfloat16" or recipe.lora is None:
        return "native", "native: PyTorch chooses, faster kernels don't take float32"
    if find_family(family).masks_text:
        return "native", f"native: PyTorch chooses at each call, {family} masks some"
    named = ".".join(map(str, capability))
    if capability >= _CUDNN_FROM:
        return "native_cudnn", f"native_cudnn: no mask, bfloat16, compute capability {named}"
    return "native", f"native: PyTorch's flash attention, compute capability {named}"


def use_attention(recipe: Recipe, modules: Iterable[nn.Module], device: torch.device) -> str:
    """Sets the kernel in every attention of the modules, once they have all their parts.

    As diffusers' `set_attention_backend` does, which sets it for all other models of the process
    too.

    Returns:
        the kernel and why, for the run's log.

    Raises:
        ValueError: as `choose_attention`.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    processors: list[Any] = [
        processor
        for module in modules
        for part in module.modules()
        if hasattr(processor := getattr(part, "processor", None), "_attention_backend")
    ]
    gpu = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    name, reason = choose_attention(recipe, gpu, dispatched=bool(processors))
    public = {kernel.value.removeprefix("_"): kernel for kernel in AttentionBackendName}
    for processor in processors:
        processor._attention_backend = public[name]
    return reason


def _require_package(kernel: str) -> None:
    if kernel not in _PACKAGES:
        return
    module, package = _PACKAGES[kernel]
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"runtime.attention = {kernel} needs the package {package}, which isn't installed: "
            "install it (each build is for one version of torch and CUDA), or use auto"
        )
