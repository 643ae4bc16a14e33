"""FSDP2: every parameter, gradient and optimiser state is split over the workers.

    rank 0 ─┐                       ┌─ block i's whole weights, for the time of its forward
    rank 1 ─┼─ all-gather block i ──┤  and again for its backward
    rank 2 ─┘                       └─ reduce-scatter: each rank keeps its part's mean gradient

While a block computes, the next one's weights are gathered, in the order of the module's lists.

With a `shard_size` (HSDP) the ranks form groups, each of which holds all parameters between its
members; gathering stays within a group, and the groups all-reduce their gradient shards:

    shard_size 2:  ranks 0 1 | 2 3    0 and 2 hold the same shard, 1 and 3 the other

No mixed-precision policy: it would round the float32 LoRA weights. The frozen base is kept in the
dtype that the recipe says, and one group may hold both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from piflow.sharding.base import InPlaceStrategy, require_process_group


class FSDPStrategy(InPlaceStrategy):
    """Shards of whole rows, by torch's `fully_shard`. The process group must be up (nccl or gloo).

    Args:
        shard_size: workers that hold one copy between them; None: all.
        offload: shards, gradients and the optimiser's state lie in host memory, and the optimiser
            steps there; a block's weights come to the device for its forward and backward pass.
        reshard_after_forward: False keeps the blocks of trained modules whole between their forward
            and backward pass. Forward passes without a backward pass must then not come between the
            step's last backward pass and the update of the weights: they would leave blocks whole
            that miss the update.

    Raises:
        ValueError: no process group is up, or `shard_size` doesn't divide the workers.
    """

    splits_frozen = True

    def __init__(
        self,
        device: torch.device,
        *,
        shard_size: int | None = None,
        reshard_after_forward: bool = True,
        offload: bool = False,
    ) -> None:
        self.rank, self.world_size = require_process_group("fsdp")
        self.device = device
        self._mesh = _mesh(device, self.world_size, shard_size)
        self._reshard_after_forward = reshard_after_forward
        self._offload = OffloadPolicy()
        if offload:
            self._offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
        self._modules: list[FSDPModule] = []

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Shards each block, then the rest, moving block by block to the device.

        All ranks must come with equal weights: none are broadcast. A model that doesn't fit on
        one device may come on the CPU.
        """
        # a module without a backward pass (teacher, EMA) would stay whole for good, and an EMA's
        # next forward would then not see what the average became meanwhile
        trained = any(parameter.requires_grad for parameter in module.parameters())
        reshard = self._reshard_after_forward or not trained
        blocks = [m for m in module.modules() if isinstance(m, block_classes)]
        for block in reversed(blocks):  # one that lies in another comes before it
            fully_shard(
                block,
                mesh=self._mesh,
                reshard_after_forward=reshard,
                offload_policy=self._offload,
            )
        # by default the rest would stay whole until a backward pass: see above
        fully_shard(
            module, mesh=self._mesh, reshard_after_forward=True, offload_policy=self._offload
        )
        if not isinstance(module, FSDPModule):
            raise TypeError(f"fully_shard left a {type(module).__name__}")
        _order_gathering(module)
        self._modules.append(module)

    @property
    def sharers(self) -> dist.ProcessGroup:
        """The workers that hold one copy of the weights between them, this one among them."""
        mesh = self._mesh if self._mesh.ndim == 1 else self._mesh["shard"]
        return mesh.get_group()

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Whether backward passes inside average gradients over the workers, or only add up.

        Raises:
            ValueError: called before `prepare`.
        """
        if not self._modules:
            raise ValueError("call prepare(module, block_classes) before gradient_sync")
        for module in self._modules:
            module.set_requires_gradient_sync(enabled)
        try:
            yield
        finally:
            for module in self._modules:
                module.set_requires_gradient_sync(True)


def _order_gathering(module: FSDPModule) -> None:
    """While a block computes, the next one is gathered; in the backward pass the one before it.

    Left to itself, FSDP follows the order of the last forward pass, whichever role made it, and so
    gathers the teacher's head for the student's backward pass. Blocks with units inside (weights
    that an fp8 teacher leaves out) keep FSDP's own order: their own units come first.
    """
    chain = _chain(module)
    if not chain:
        return
    module.set_modules_to_backward_prefetch([chain[-1]])
    parts = (part for block in chain for part in cast(nn.Module, block).modules())
    if sum(isinstance(part, FSDPModule) for part in parts) > len(chain):
        return
    module.set_modules_to_forward_prefetch([chain[0]])
    for block, following in pairwise(chain):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def _chain(module: FSDPModule) -> list[FSDPModule]:
    """Sharded entries of the module's lists, in the order in which models call them.

    Lists within an entry are its own affair.
    """
    chain: list[FSDPModule] = []
    inside: set[nn.Module] = set()
    for stack in cast(nn.Module, module).modules():
        if isinstance(stack, nn.ModuleList) and stack not in inside:
            for block in stack:
                if isinstance(block, FSDPModule):
                    chain.append(block)
                    inside.update(block.modules())
    return chain


def _mesh(device: torch.device, world_size: int, shard_size: int | None) -> DeviceMesh:
    """All workers in a row; or (groups, workers of a group), neighbours in one group."""
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device.type, (world_size,))
    if world_size % shard_size:
        raise ValueError(
            f"runtime.shard_size {shard_size} must divide the number of workers, {world_size}"
        )
    return init_device_mesh(
        device.type,
        (world_size // shard_size, shard_size),
        mesh_dim_names=("replicate", "shard"),
    )
