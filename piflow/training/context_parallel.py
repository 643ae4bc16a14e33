"""Context parallelism: neighbours compute one micro-batch together, each a part of its tokens.

    rank 0: first half of the text's and of the picture's tokens ─┐  every block's attention:
    rank 1: second half of both                                  ─┘  all tokens, half of the heads

That is Ulysses (arXiv 2309.14509), by diffusers' plan of each model: inputs are split where the
model, or its first block, begins; each attention exchanges tokens for heads and back; the output
layer's tokens are gathered. Policies, losses and rollouts then see whole samples on every rank of a
group, which all draw the same numbers. A rank's gradients are those of its tokens, so that a
group's sum is the micro-batch's gradient, and nothing but that sum tells strategies from others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from piflow.backbones.base import PATCH, Backbone
from piflow.backbones.codec import Codec


def split_tokens(
    backbone: Backbone, modules: Iterable[nn.Module], size: int, device: torch.device
) -> None:
    """Spreads each sample's tokens over `size` neighbouring ranks; before sharding.

    As `enable_parallelism` does, which in diffusers 0.42 can't on a CPU: it takes the rank modulo
    the number of accelerators. A collective.

    Args:
        backbone: the student's.
        modules: all that are called, once they have all their parts.
        size: 1 changes nothing; the process group's size is a multiple of it.

    Raises:
        ValueError: the heads can't be dealt out evenly.
    """
    if size == 1:
        return
    heads = int(str(backbone.config["num_attention_heads"]))
    if heads % size:
        raise ValueError(
            f"runtime.context_parallel = {size} deals out attention heads evenly, and the model "
            f"has {heads}; use a divisor"
        )
    from diffusers.hooks import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    mesh = dist.device_mesh.init_device_mesh(
        device.type,
        (dist.get_world_size() // size, 1, size),
        mesh_dim_names=("group", "ring", "ulysses"),
    )
    split = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    config = ParallelConfig(context_parallel_config=split)
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    for module in modules:
        model: Any = module
        for part in module.modules():
            processor: Any = getattr(part, "processor", None)
            if processor is not None:
                processor._parallel_config = config
        apply_context_parallel(module, split, model._cp_plan)


def check_pictures(
    codec: Codec, sizes: Iterable[Sequence[int]], size: int, patch_size: int = PATCH
) -> None:
    """Refuses picture sizes whose tokens `size` ranks can't share evenly.

    Args:
        sizes: height and width of each, in pixels.
        patch_size: the family's.

    Raises:
        ValueError: one of them.
    """
    for height, width in sizes:
        _, rows, columns = codec.latent_shape(height, width)
        tokens = rows * columns // patch_size**2
        if tokens % size:
            raise ValueError(
                f"runtime.context_parallel = {size} deals out each picture's tokens evenly, and "
                f"one of {height}x{width} pixels has {tokens}; use other sizes, or another number"
            )
