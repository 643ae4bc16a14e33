"""Ray Train's workers and how the model is spread over them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from piflow.config.section import Positive, PositiveFloat, Seconds, Section

GPU_ATTENTION = ("native_cudnn", "native_flash", "native_efficient", "flash")
"""Kernels of runtime.attention that run on GPUs alone."""


class DeepSpeedConfig(Section):
    """What ZeRO splits over the workers, and what lies in host memory."""

    stage: Literal[1, 2, 3] = 2
    """1: optimiser state; 2: and gradients; 3: and all weights, the base's too."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: optimiser state and its step in host memory."""

    offload_parameters: Literal["none", "cpu"] = "none"
    """cpu: split weights in host memory; stage 3."""

    bucket_values: Positive = 50_000_000
    """Values that are reduced or gathered at once; a buffer of them."""

    @property
    def offloads(self) -> bool:
        """Whether anything lies in host memory."""
        return "cpu" in (self.offload_optimizer, self.offload_parameters)

    @model_validator(mode="after")
    def _offloads_what_is_split(self) -> DeepSpeedConfig:
        if self.offload_parameters == "cpu" and self.stage < 3:
            raise ValueError(
                f"offload_parameters = cpu is about split weights and stage {self.stage} keeps "
                "them whole; use stage 3, or leave it out"
            )
        return self


class PreflightConfig(Section):
    """What `piflow preflight` asks of the workers' machines; what has no floor is only measured."""

    transport: Literal["any", "rdma"] = "any"
    """Network between machines: rdma refuses NCCL's silent fallback to TCP; any: what it finds."""

    allreduce_gb_s: PositiveFloat | None = None
    """Least bus bandwidth of an all-reduce over all workers, GB/s: the time of one tells it, with
    2 (n - 1) / n times its bytes for n workers, as NVIDIA's nccl-tests counts.
    """

    storage_mb_s: PositiveFloat | None = None
    """Least speed, MB/s, of writing to run_dir and of reading from it, of each machine while all
    do.
    """

    clock_s: Seconds = 5.0
    """Most seconds between two machines' clocks."""


class RuntimeConfig(Section):
    """Ray Train's workers. Changing any of these never changes a run's results."""

    num_workers: Annotated[
        Positive | Annotated[tuple[Positive, Positive], Field(strict=False)],
        Field(union_mode="left_to_right"),
    ] = 1
    """Training processes; or [fewest, most]: as many as the cluster has room for, also when it
    grows or shrinks.
    """

    use_gpu: bool = False
    """One GPU a worker, and nccl instead of gloo."""

    cpus_per_worker: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Logical CPUs that Ray reserves."""

    strategy: Literal["auto", "fsdp", "ddp", "deepspeed", "single"] = "auto"
    """fsdp: FSDP2 shards parameters over the workers; ddp: every worker has them all; deepspeed:
    ZeRO; auto: ddp if that is estimated to fit, else fsdp.
    """

    deepspeed: DeepSpeedConfig | None = None
    """Options of strategy = deepspeed; default: stage 2, nothing offloaded."""

    shard_size: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Workers that share one copy of the parameters under fsdp, e.g. a node's GPUs (HSDP); default:
    all.
    """

    reshard_after_forward: bool | None = None
    """fsdp: false keeps the student's blocks whole until their backward pass, which gathers them
    once a segment and takes more memory; default: false where that is estimated to fit, which the
    run logs.
    """

    offload: Literal["none", "cpu"] = "none"
    """fsdp: cpu keeps shards, their gradients, the optimiser's state and its step in host memory.
    """

    context_parallel: Positive = 1
    """Neighbouring workers that compute each micro-batch together, each a part of its tokens: for
    large pictures; num_workers is a multiple.
    """

    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What the backward pass computes again, for less memory: full: each block from its input;
    selective: all of a block but its matrix products and attention.
    """

    attention: Literal[
        "auto", "native", "native_cudnn", "native_flash", "native_efficient", "flash"
    ] = "auto"
    """Attention's kernel, by its name in diffusers. native: as PyTorch chooses at each call, with
    or without a mask; native_cudnn, native_flash, native_efficient: PyTorch's kernels of these
    names; flash: the package flash-attn; auto: what fits GPU, mask and dtype, which the run logs.
    """

    compile: bool = False
    """Torch.compile of each block; seconds to minutes at the start."""

    max_failures: int = Field(3, ge=-1, le=1_000_000)
    """Restarts from the last checkpoint; -1 = always."""

    max_preemption_failures: int = Field(-1, ge=-1, le=1_000_000)
    """Restarts after machines were taken away before their workers had saved; they don't count as
    max_failures. -1 = always. Those whose workers had saved are never counted.
    """

    preemption_grace_s: Annotated[float, Field(ge=0, le=1e8)] = 30.0
    """Seconds that the other workers have, after a machine was to go, to end a save that is under
    way, before they are started again.
    """

    relax_collectives_on_preemption: bool = False
    """Ray Train's own exchanges go on without workers of a machine that goes. A checkpoint needs
    every worker's part, so this helps no save; it only ends waiting for a machine that went early.
    """

    worker_start_timeout: Seconds = 1800.0
    """Seconds until the workers must be up (GPU nodes take minutes)."""

    resize_interval: Seconds = 60.0
    """Seconds between looks whether a range of workers has room for more."""

    peak_tflops: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """TFLOP/s of a worker's device at best, for Prometheus' utilisation; default: a known GPU's
    (dense bfloat16), else there is no utilisation.
    """

    stall_timeout: Seconds = 1800.0
    """Seconds that a step may take, or the start before the first one (loading, compiling) or the
    last upload, before a worker counts as hanging and is restarted.
    """

    preflight: PreflightConfig = PreflightConfig()

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_number_or_a_range(cls, value: Any) -> Any:
        ends = value if isinstance(value, list | tuple) else [value]
        numbers = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        if not numbers or len(ends) not in (1, 2) or not 1 <= ends[0] <= ends[-1]:
            raise ValueError("expected a positive number of workers, or [fewest, most]")
        return value

    @model_validator(mode="after")
    def _options_fit_strategy(self) -> RuntimeConfig:
        if self.strategy == "single" and self.max_workers > 1:
            raise ValueError(
                f"strategy = single runs on one worker, num_workers is {self.num_workers}; use "
                "strategy auto, fsdp or ddp, or one worker"
            )
        if self.shard_size is not None and self.is_elastic:
            raise ValueError(
                f"shard_size ({self.shard_size}) must divide the number of workers, and "
                f"num_workers = {list(self.worker_range)} may become any in between; leave "
                "shard_size out, or use a fixed number"
            )
        if self.shard_size is not None and self.max_workers % self.shard_size:
            raise ValueError(
                f"shard_size ({self.shard_size}) must divide num_workers ({self.num_workers}): "
                "every group of shard_size workers holds one copy of the parameters"
            )
        if self.context_parallel > 1 and self.is_elastic:
            raise ValueError(
                f"context_parallel ({self.context_parallel}) must divide the number of workers, "
                f"and num_workers = {list(self.worker_range)} may become any in between; leave "
                "context_parallel out, or use a fixed number"
            )
        if self.max_workers % self.context_parallel:
            raise ValueError(
                f"context_parallel ({self.context_parallel}) must divide num_workers "
                f"({self.num_workers}): so many compute a micro-batch together; use another number"
            )
        if self.strategy in ("ddp", "deepspeed", "single"):
            self._refuse_sharding_options()
        if self.deepspeed is not None and self.strategy != "deepspeed":
            raise ValueError(
                f"deepspeed has options, but strategy is {self.strategy}; leave them out, or use "
                "strategy deepspeed"
            )
        return self

    @model_validator(mode="after")
    def _transport_fits_device(self) -> RuntimeConfig:
        if self.preflight.transport == "rdma" and not self.use_gpu:
            raise ValueError(
                "preflight.transport = rdma is about NCCL, and use_gpu = false has the workers "
                "talk by gloo over TCP; use transport any, or use_gpu true"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> RuntimeConfig:
        if self.attention in GPU_ATTENTION and not self.use_gpu:
            raise ValueError(
                f"attention = {self.attention} is a kernel for GPUs, and use_gpu is false; use auto"
            )
        if self.attention == "native_efficient" and self.context_parallel > 1:
            raise ValueError(
                f"diffusers has no context parallelism with attention = native_efficient, and "
                f"context_parallel is {self.context_parallel}; use auto"
            )
        return self

    @model_validator(mode="after")
    def _blocks_stay_whole(self) -> RuntimeConfig:
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing = selective picks operations of a block, and compile "
                "makes one of them all; use activation_checkpointing full or none, or don't compile"
            )
        if self.deepspeed is None or self.deepspeed.stage < 3:
            return self
        if self.compile:
            raise ValueError(
                "compile makes one piece of a block, and DeepSpeed's stage 3 gathers weights "
                "between its layers; use strategy fsdp, or don't compile"
            )
        if self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing = selective computes part of a block again, and "
                "DeepSpeed's stage 3 gathers weights in between, not as in the forward pass; use "
                "full, or strategy fsdp"
            )
        return self

    def _refuse_sharding_options(self) -> None:
        options = {
            "shard_size": self.shard_size is not None,
            "reshard_after_forward": self.reshard_after_forward is False,
            "offload": self.offload != "none",
        }
        for option in (name for name, changed in options.items() if changed):
            raise ValueError(
                f"{option} is about FSDP's shards and strategy = {self.strategy} has none; leave "
                "it out, or use strategy fsdp or auto"
            )

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        return self.num_workers

    @property
    def max_workers(self) -> int:
        """The most workers that a run may have."""
        return self.worker_range[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.worker_range[0] != self.worker_range[1]

    @property
    def uses_deepspeed(self) -> bool:
        """Whether its engine runs; for one worker only if it has something to offload."""
        offloads = self.deepspeed is not None and self.deepspeed.offloads
        return self.strategy == "deepspeed" and (self.max_workers > 1 or offloads)
