"""DeepSpeed's ZeRO: its engine owns gradients, optimiser step and whatever it splits.

                     weights   gradients            optimiser state
    stage 1          whole     whole                split
    stage 2          whole     split, every part    split
    stage 3          split     split, every part    split; weights are gathered module by module

    backward(loss, last) ── engine.backward ── reduces (stage 1: after the step's last part only)
    update(max_norm)     ── engine.step     ── norm, clip, optimiser on this worker's part, gather

The engine's own precision modes stay off: they would cast the float32 LoRA weights and their
average. The frozen base is kept in the dtype that the recipe says. Nothing of DeepSpeed's that has
to be compiled is used, and nothing of it is imported before a recipe asks for it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from piflow.config import DeepSpeedConfig
from piflow.sharding.base import require_process_group
from piflow.sharding.tensors import Part, SplitTensor, part_of

_STEP = "step"  # AdamW's count, one a flat tensor
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedStrategy:
    """ZeRO, as a `Strategy`. The process group must be up (nccl or gloo).

    One AdamW moves everything, and in one step every backward pass has to reach the same trained
    parameters (stage 3 keeps the last gradient of a parameter that gets none).

    Raises:
        ValueError: no process group is up, or DeepSpeed isn't installed.
    """

    def __init__(self, device: torch.device, config: DeepSpeedConfig) -> None:
        self.rank, self.world_size = require_process_group("deepspeed")
        self.device = device
        self.config = config
        self._deepspeed = _import_deepspeed(device)
        self.splits_frozen = config.stage == 3
        self._modules: list[nn.Module] = []
        self._engines: list[Any] = []  # the first one trains

    def prepare(self, module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
        """Moves the module to the device; stage 3 splits every parameter over the workers.

        Parameters without storage ("meta") get it under stage 3, one module at a time, and hold
        nothing yet. Others must be equal on all workers: rank 0's count.
        """
        if self.config.stage == 3:
            self._split(module)
        module.to(self.device)
        self._modules.append(module)

    def adopt(self, optimizers: Sequence[Optimizer]) -> None:
        """Starts the engines: one for the module that is trained, under stage 3 one for each other.

        Raises:
            ValueError: several optimisers, another than AdamW, or several trained modules.
        """
        if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.AdamW):
            kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise ValueError(f"strategy deepspeed moves all parameters by one AdamW, got {kinds}")
        trained = [module for module in self._modules if _trains(module)]
        if len(trained) != 1:
            raise ValueError(f"strategy deepspeed trains one module, {len(trained)} are prepared")
        self._engines = [self._engine(trained[0], optimizers[0])]
        if self.config.stage == 3:  # the hooks that gather weights are an engine's
            others = [module for module in self._modules if module is not trained[0]]
            self._engines += [self._engine(module, None) for module in others]
        for flat in self._flat_weights():
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in _MOMENTS}
            optimizers[0].state[flat] = {_STEP: torch.zeros(()), **moments}
        if self.config.stage < 3:  # done in the first step else, too late to restore a checkpoint
            self._engines[0].optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The engine's backward pass: it reduces gradients as its stage wants.

        Raises:
            ValueError: called before `adopt`.
        """
        engine = self._training_engine()
        # as the engine's forward does; the modules are called without it, in several roles
        engine.optimizer.clear_backward_seen_flag()
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)

    def update(
        self, parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer], max_norm: float
    ) -> float:
        """The engine's step, which knows parameters and optimiser."""
        engine = self._training_engine()
        engine.optimizer.clip_grad = max_norm if math.isfinite(max_norm) else 0.0
        engine.step()
        if not engine.was_step_applied():
            return math.nan
        return float(engine.get_global_grad_norm())

    def part(self, tensor: Tensor) -> Part:
        """Under stage 3 flat, of equal size on all workers; the last one's end is padding."""
        return _part(tensor)

    def local(self, tensor: Tensor) -> Tensor:
        """The values that `part` names; under stage 3 the last worker's end with padding."""
        return _part(tensor).values

    def saved_parameter(self, parameter: Tensor) -> SplitTensor:
        """It comes together whole, since its parts are no rows."""
        return _Weight(self, parameter)

    def split_state(
        self, optimizer: Optimizer, parameter: nn.Parameter
    ) -> Mapping[str, SplitTensor]:
        """AdamW's count and moments; they are there from `adopt` on."""
        counts = [optimizer.state[flat][_STEP] for flat in self._flat_weights()]
        return {_STEP: _Count(counts), **{key: _Moment(self, parameter, key) for key in _MOMENTS}}

    def _training_engine(self) -> Any:
        if not self._engines:
            raise ValueError("call prepare and adopt before training")
        return self._engines[0]

    def _split(self, module: nn.Module) -> None:
        """Partitions the parameters, innermost modules first."""
        for part in reversed(list(module.modules())):
            own = dict(part.named_parameters(recurse=False))
            for name, parameter in own.items():
                if parameter.is_meta:
                    empty = torch.empty_like(parameter, device=self.device)
                    part.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
            if own:
                self._deepspeed.zero.Init(module=part, config_dict_or_path=self._engine_config())

    def _engine(self, module: nn.Module, optimizer: Optimizer | None) -> Any:
        return self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._engine_config()
        )[0]

    def _engine_config(self) -> dict[str, Any]:
        """What the engine is told; the recipe's strategy, learning rate and clipping stay ours."""
        pin = self.device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": self.config.stage,
            "overlap_comm": False,
            # buffers of this many values; the default's are of 2 GB whatever the model's size
            "reduce_bucket_size": self.config.bucket_values,
            "allgather_bucket_size": self.config.bucket_values,
        }
        if self.config.stage == 3:
            zero |= {
                "memory_efficient_linear": False,  # it replaces torch's linear for the process
                # whole weights between steps would miss what the average became meanwhile
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,  # the order of calls differs from role to role
            }
        if self.config.offload_optimizer == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if self.config.offload_parameters == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
        return {
            "train_micro_batch_size_per_gpu": 1,  # for its log alone: our steps have their own
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, wherever its state lies
            "log_level": "warning",
        }

    def _flat_weights(self) -> list[Any]:
        """This worker's part of the trained weights, flat, as the optimiser sees them."""
        optimizer = self._training_engine().optimizer
        if self.config.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    @contextmanager
    def _whole(self, tensor: Tensor) -> Iterator[Tensor]:
        """All of a parameter, for the time of the context."""
        if not _is_split(tensor):
            yield tensor
            return
        with self._deepspeed.zero.GatheredParameters([tensor]):
            yield tensor


class _Weight:
    """A trained parameter, an average's or a frozen one."""

    def __init__(self, strategy: DeepSpeedStrategy, parameter: Any) -> None:
        self._strategy = strategy
        self._parameter = parameter
        self.shape = _part(parameter).shape
        self.dtype = parameter.dtype

    def whole(self) -> Tensor:
        """A copy."""
        with self._strategy._whole(self._parameter) as whole:
            return whole.detach().clone()

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Also the copy that the optimiser moves."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter = self._parameter
        if _is_split(parameter):
            part = _values_of_part(whole, _part(parameter))
            parameter.ds_tensor.copy_(part)
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, part)
            return
        parameter.copy_(whole)
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, whole)


class _Moment:
    """One of AdamW's moments of a trained parameter."""

    def __init__(self, strategy: DeepSpeedStrategy, parameter: nn.Parameter, key: str) -> None:
        self._strategy = strategy
        self._parameter = parameter
        self._key = key
        self.shape = _part(parameter).shape
        self.dtype = torch.float32

    def whole(self) -> Tensor:
        """A copy."""
        from deepspeed.utils import safe_get_full_optimizer_state

        whole: Tensor = safe_get_full_optimizer_state(self._parameter, self._key)
        return whole

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """On this worker's part, or all of it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if _is_split(self._parameter):
            part = _values_of_part(whole, _part(self._parameter))
            safe_set_local_optimizer_state(self._parameter, part, self._key)
        else:
            safe_set_full_optimizer_state(self._parameter, whole, self._key)


class _Count:
    """AdamW's count of steps: the same for all parameters, which it moves together."""

    def __init__(self, counts: Sequence[Tensor]) -> None:
        self._counts = counts
        self.shape = torch.Size()
        self.dtype = torch.float32

    def whole(self) -> Tensor:
        """A copy."""
        return self._counts[0].clone()

    def fill(self, whole: Tensor) -> None:
        """All counts alike."""
        for count in self._counts:
            count.copy_(whole)


def _import_deepspeed(device: torch.device) -> Any:
    """The package, on the process group that is up."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"runtime.strategy deepspeed needs the package deepspeed ({error}): run "
            "`pip install 'piflow[deepspeed]'`, or use runtime.strategy fsdp"
        ) from error
    import deepspeed.ops
    from deepspeed.utils.logging import set_log_level_from_string

    # it would compile what its own collectives on CPUs want; none of them is called here
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    # torch has new names for what DeepSpeed calls, and says so at every call
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated")
    set_log_level_from_string("warning")
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    return deepspeed


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_split(tensor: Any) -> bool:
    """Whether stage 3 has split it: it is empty then, and its part hangs on it as `ds_tensor`."""
    return hasattr(tensor, "ds_tensor")


def _part(tensor: Any) -> Part:
    if not _is_split(tensor):
        return part_of(tensor)
    values = tensor.ds_tensor.detach()
    return Part(values, tensor.ds_zero_partition_rank * values.numel(), tensor.ds_shape)


def _values_of_part(whole: Tensor, part: Part) -> Tensor:
    """This worker's values of a whole tensor, flat; the last worker's end is padded with zeros."""
    mine = torch.zeros(part.values.numel(), dtype=whole.dtype, device=part.values.device)
    values = whole.reshape(-1)[part.first : part.first + len(mine)]
    mine[: len(values)].copy_(values)
    return mine
