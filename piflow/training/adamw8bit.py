"""AdamW with both moments in 8 bits: torchao's optimiser over blocks that never cross rows.

torchao decides by each worker's own shard which tensors are quantised and cuts them into blocks
across rows; a checkpoint of four workers then doesn't fit two. Here all state is made at once, a
row's blocks on the row's worker: codes (rows, ...) and scales (rows, blocks a row) are sharded as
the parameter is, so they are saved and restored exactly, on any number of workers.

Needs the package torchao; nothing else in piflow does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from piflow.sharding.tensors import local_shard
from piflow.training.optimizer_state import BlockwiseState, block_size


class BlockwiseAdamW8bit(AdamW8bit, BlockwiseState):
    """AdamW; a moment is a code of 8 bits a value and a float32 scale a block (arXiv 2110.02861).

    Args:
        params: param groups of parameters whose rows split into blocks, see `block_size`.
        lr, betas, weight_decay: as in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self._stored: dict[nn.Parameter, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._allocate(parameter)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; on the CPU eagerly: torch.compile there takes g++ and seconds a shape."""
        devices = {p.device.type for group in self.param_groups for p in group["params"]}
        stance: AbstractContextManager[object] = nullcontext()
        if devices == {"cpu"}:
            stance = torch.compiler.set_stance("force_eager")
        with stance:
            result: float | None = super().step(closure)
        return result

    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Step, codes and scales; they share memory with the state."""
        return {"step": self.state[parameter]["step"], **self._stored[parameter]}

    def _allocate(self, parameter: nn.Parameter) -> None:
        state: dict[str, Tensor] = {"step": torch.tensor(0.0)}
        stored = {}
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            moment, codes, scale = _zeros(parameter, signed)
            state[key] = moment
            stored[f"{key}.codes"] = codes
            stored[f"{key}.scale"] = scale
        self.state[parameter] = state
        self._stored[parameter] = stored


def _zeros(parameter: nn.Parameter, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A moment that is zero; and its codes and scales, which share its memory."""
    local = local_shard(parameter)
    rows, size = local.shape[0], block_size(parameter)
    blocks = parameter.numel() // parameter.shape[0] // size
    if local.numel() == 0:  # a worker without a row: nothing to quantise
        moment = torch.zeros_like(local)
        codes = torch.zeros_like(local, dtype=torch.uint8)
        scale = torch.zeros(0, device=local.device)
    else:
        moment = OptimState8bit.zeros(local.shape, signed, size, local.device, dtype=local.dtype)
        codes, scale = moment.codes, moment.scale
    return (
        _sharded_as(parameter, moment, parameter.shape),
        _sharded_as(parameter, codes, parameter.shape),
        _sharded_as(parameter, scale.view(rows, blocks), torch.Size((parameter.shape[0], blocks))),
    )


def _sharded_as(parameter: nn.Parameter, local: Tensor, shape: torch.Size) -> Tensor:
    """`local` as this worker's rows of a tensor of `shape`, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
