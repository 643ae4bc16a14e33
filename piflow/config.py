"""The typed recipe: the only home of defaults.

A recipe is one YAML file. Every key has its meaning and unit here; unknown keys are refused, and an
error names the key, what came and what is allowed. Nothing heavy is imported, so mistakes surface
before anything is started or rented.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RecipeError(ValueError):
    """A recipe that can't be used; the message names the key, the value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class _Variant(_Section):
    """One choice of several; `type` says which."""

    type: str


class Fp8TeacherConfig(_Section):
    """The teacher's matrix products in 8 bits, at no more memory; the student keeps its precision.

    The results depend on it, the less the smaller the measured error is.
    """

    check_every: Positive = Field(
        250, description="optimiser steps between measurements of the teacher's error"
    )
    max_error: PositiveFloat = Field(
        0.1,
        description="relative L2 error of its velocity, against the base's own precision, above "
        "which the run stops",
    )


class ModelConfig(_Section):
    """The teacher: one diffusers transformer and the codec between pictures and its latents."""

    family: Literal["flux", "flux2", "qwen_image", "sd3", "dit"] = Field(
        "flux",
        description="the architecture: FLUX.1, FLUX.2, Qwen-Image, Stable Diffusion 3(.5), or "
        "class-conditional DiT",
    )
    path: str = Field(
        description="URI (local, s3://, hf://) of its folder: config.json and safetensors files"
    )
    codec: Literal["pixels", "vae"] = Field(
        "pixels", description="pixels: RGB, space-to-depth by 2, 12 latent channels; or the VAE"
    )
    vae: str | None = Field(
        None, description="URI of the VAE's folder; default: `vae` beside the transformer's"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="the frozen base's dtype")
    fp8_teacher: Fp8TeacherConfig | None = Field(
        None,
        description="{} or its options: the teacher's velocity in fp8 (needs torchao, and a GPU of "
        "compute capability 8.9); null: in `dtype`",
    )


class BertEncoderConfig(_Variant):
    """A BERT-like text encoder: token states, and their mean as the pooled vector."""

    type: Literal["bert"] = "bert"
    path: str = Field(description="URI of a transformers folder (config, tokenizer, weights)")
    max_tokens: Positive = Field(64, description="tokens a prompt is padded or truncated to")


class FluxEncoderConfig(_Variant):
    """FLUX.1's two text encoders: T5 for token states, CLIP for the pooled vector."""

    type: Literal["flux"] = "flux"
    path: str = Field(description="URI of a folder with text_encoder(_2) and tokenizer(_2)")
    max_tokens: Positive = Field(512, description="T5 tokens a prompt is padded or truncated to")
    padding: Literal["keep", "drop"] = Field(
        "keep",
        description="keep: all max_tokens states, as FluxPipeline feeds; drop: only the prompt's, "
        "zeros elsewhere (10-40 times smaller store, another conditioning than the pipeline's)",
    )


class Flux2EncoderConfig(_Variant):
    """FLUX.2's text encoder: Mistral 3 after the family's system message, three layers' states."""

    type: Literal["flux2"] = "flux2"
    path: str = Field(description="URI of a folder with text_encoder and tokenizer")
    max_tokens: Positive = Field(
        512, description="tokens, with the system message's, that a prompt is padded or cut to"
    )


class QwenImageEncoderConfig(_Variant):
    """Qwen-Image's text encoder: Qwen2.5-VL under the family's template."""

    type: Literal["qwen_image"] = "qwen_image"
    path: str = Field(description="URI of a folder with text_encoder and tokenizer")
    max_tokens: Positive = Field(512, description="tokens after the template's, at most 1024")


class SD3EncoderConfig(_Variant):
    """Stable Diffusion 3's encoders: two CLIP models' states, then T5's; CLIP's pooled vectors."""

    type: Literal["sd3"] = "sd3"
    path: str = Field(description="URI of a folder with text_encoder(_2, _3), tokenizer(_2, _3)")
    max_tokens: Positive = Field(256, description="T5 tokens a prompt is padded or truncated to")
    padding: Literal["keep", "drop"] = Field(
        "keep",
        description="keep: all states, as StableDiffusion3Pipeline feeds; drop: of T5 only the "
        "prompt's, zeros elsewhere (a smaller store, another conditioning than the pipeline's)",
    )


class ClassLabelEncoderConfig(_Variant):
    """No text: a prompt is a class number; the empty prompt is the null class."""

    type: Literal["class_label"] = "class_label"
    num_classes: Positive = Field(1000, description="prompts are 0 .. num_classes - 1")


EncoderConfig = (
    BertEncoderConfig
    | FluxEncoderConfig
    | Flux2EncoderConfig
    | QwenImageEncoderConfig
    | SD3EncoderConfig
    | ClassLabelEncoderConfig
)


class EmbedConfig(_Section):
    """prompts -> embedding store."""

    mode: Literal["store", "online"] = Field(
        "store",
        description="store: training reads what `piflow embed` wrote; online: no store, prompts "
        "are encoded while training runs, each once an epoch, and batches are the same",
    )
    prompts: str = Field(
        description="URI of a .txt (one a line), .jsonl, .csv or .parquet file, all but Parquet "
        "also as .gz; of a pattern such as s3://bucket/prompts/*.parquet, whose files are read in "
        "order of their names; or of a dataset folder, whose `train` split is read"
    )
    prompt_column: str = Field("prompt", description="the column, for files that have columns")
    height_column: str | None = Field(
        None, description="column of a prompt's own picture height in pixels; empty: see buckets"
    )
    width_column: str | None = Field(None, description="the same for the width; both or neither")
    image_column: str | None = Field(
        None,
        description="column of the prompts' pictures: a path relative to the prompts file's "
        "folder, a URI or, in Parquet, bytes; their latents then lie in the store",
    )
    latent_dtype: Literal["bf16", "fp32"] = Field("bf16", description="latents on disk")
    bad_pictures: Literal["stop", "skip"] = Field(
        "stop",
        description="unreadable pictures, and those smaller than their size: stop, or leave the "
        "prompt out and list it in the manifest",
    )
    max_bad_pictures: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the prompts that skip may leave out; with more the job ends, since "
        "something else than pictures may be wrong",
    )
    buckets: list[Annotated[list[Positive], Field(min_length=2, max_length=2)]] = Field(
        [],
        description="[height, width] sizes in pixels, one chosen for each prompt that has no size "
        "of its own; listed twice, it is chosen twice as often; [] gives them height x width",
    )
    seed: NonNegative = Field(0, description="of the choice among buckets, with the prompt's text")
    store: str = Field(
        description="URI of the embedding store's folder; in online mode, of the folder for the "
        "few embeddings that guidance and pictures need"
    )
    height: Positive = Field(
        description="pixels of the pictures that prompts stand for without a size of their own or "
        "buckets, and of samples and evaluation"
    )
    width: Positive = Field(description="pixels")
    dtype: Literal["fp8", "bf16"] = Field("fp8", description="token states on disk")
    rows_per_shard: Positive = Field(4096, description="prompts a Parquet file")
    rows_per_group: Positive = Field(
        256, description="prompts a row group, the unit of reading and of encoding"
    )
    batch_size: Positive = Field(64, description="prompts an encoder call")
    encoders: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        [1, 1], description="[min, max] encoder actors of the pool"
    )
    gpus_per_encoder: float = Field(0.0, ge=0, description="may be fractional")

    @property
    def has_several_sizes(self) -> bool:
        """Whether prompts may stand for pictures of different sizes."""
        return bool(self.buckets) or self.height_column is not None

    @model_validator(mode="after")
    def _columns_in_pairs(self) -> EmbedConfig:
        if (self.height_column is None) != (self.width_column is None):
            raise ValueError(
                f"height_column is {self.height_column!r} and width_column is "
                f"{self.width_column!r}; a picture's size needs both, or neither"
            )
        return self


class GMFlowPolicyConfig(_Variant):
    """A Gaussian mixture per latent pixel (arXiv 2510.14974, section 3)."""

    type: Literal["gmflow"] = "gmflow"
    num_gaussians: Positive = Field(8, description="mixture components K")
    logstd_inner_dim: Positive = Field(1024, description="width of the log-std MLP")
    num_logstd_layers: Literal[2] = Field(2, description="layers of the log-std MLP")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="probability that a component is dropped in training rollouts"
    )


class DXPolicyConfig(_Variant):
    """x0 as a function of time over a segment (arXiv 2510.14974, section 3)."""

    type: Literal["dx"] = "dx"
    mode: Literal["grid", "polynomial"] = Field(
        "grid", description="values interpolated linearly in tau, or a polynomial's coefficients"
    )
    num_points: Positive = Field(10, description="grid values or coefficients, N_g")


PolicyConfig = GMFlowPolicyConfig | DXPolicyConfig


class GuidanceConfig(_Section):
    """How the teacher is guided."""

    scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 = off")
    interval: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="sigma range in which guidance is on"
    )
    orthogonal: Fraction = Field(
        0.0, description="share of the parallel part that is projected out"
    )
    embedded: float | None = Field(None, ge=0, description="FLUX's guidance input")
    negative_prompt: str = Field(
        "", description="the other side of classifier-free guidance; `piflow embed` encodes it"
    )


class PiIDConfig(_Variant):
    """π-ID: policy-based imitation distillation (arXiv 2510.14974, section 4)."""

    type: Literal["pi_id"] = "pi_id"
    data: Literal["free", "dependent"] = Field(
        "free", description="free: from noise, all segments; dependent: from noised pictures, one"
    )
    pictures: Literal["store", "emoji"] | None = Field(
        None,
        description="where pictures of the prompts come from, for data = dependent: their latents "
        "from the embedding store (embed.image_column), or drawn emoji",
    )
    nfe: Annotated[int, Field(ge=1, le=64)] = Field(4, description="network evaluations, N")
    final_step_size_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="length of the last segment in tau, relative to the others"
    )
    shift: PositiveFloat = Field(3.2, description="time shift s of the noise schedule")
    total_substeps: Positive = Field(128, description="policy substeps over tau in [0, 1]")
    num_intermediate_states: Positive = Field(4, description="teacher evaluations a segment, J")
    window_substeps: NonNegative = Field(3, description="micro-window, in substeps of a segment")
    num_decay_iters: NonNegative = Field(2000, description="steps until lambda is 0; 0 = on-policy")
    loss_scale: PositiveFloat = Field(30.0, description="factor of the loss")

    @model_validator(mode="after")
    def _has_pictures(self) -> PiIDConfig:
        if (self.data == "dependent") != (self.pictures is not None):
            raise ValueError(
                f"data = {self.data} goes with {'a' if self.data == 'dependent' else 'no'} source "
                f"of pictures, pictures is {self.pictures}; set both or neither"
            )
        return self


class FlowMatchingConfig(_Variant):
    """Flow-matching pre-training of a small teacher: all weights, velocity target."""

    type: Literal["flow_matching"] = "flow_matching"
    pictures: Literal["store", "emoji"] = Field(
        "emoji",
        description="where pictures of the prompts come from: their latents from the embedding "
        "store (embed.image_column), or drawn emoji",
    )
    shift: PositiveFloat = Field(1.0, description="time shift of the sampler in evaluation")
    logit_mean: float = Field(0.3, description="sigma = sigmoid(normal(mean, std))")
    logit_std: PositiveFloat = Field(1.0, description="see logit_mean")
    prompt_dropout: Fraction = Field(0.1, description="share trained on the empty prompt, for CFG")


class LoRAConfig(_Section):
    """The student's adapter; alpha = rank."""

    rank: Positive = Field(256, description="rank of every adapted layer")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="on the adapter's input, in training"
    )
    targets: list[str] | None = Field(
        None, description="module name suffixes; default: the family's own"
    )


class EMAConfig(_Section):
    """beta_t = (1 - 1/t)^(gamma + 1), counted from `start`; or a fixed beta."""

    gamma: PositiveFloat = Field(7.0, description="larger follows the weights faster")
    beta: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="a constant share of the old average, e.g. 0.999, in place of gamma"
    )
    start: NonNegative = Field(100, description="optimiser step at which averaging starts")


class ParameterGroupConfig(_Section):
    """Trainable parameters with a learning rate or weight decay of their own."""

    match: Annotated[str, Field(min_length=1)] = Field(
        description="shell pattern of parameter names, e.g. 'proj_out_*' or '*.lora_B.weight'"
    )
    lr_scale: float = Field(1.0, ge=0, description="factor of the learning rate")
    weight_decay: float | None = Field(None, ge=0, description="default: the optimiser's")


class OptimizerConfig(_Section):
    """AdamW; or Muon on the weight matrices and AdamW on the rest (whole ones: no shards)."""

    type: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw", description="adamw8bit: both moments in 8 bits (torchao); muon: not sharded"
    )
    lr: PositiveFloat = Field(1e-4, description="learning rate after warm-up")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's two decay rates")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, times lr a step")
    warmup_steps: NonNegative = Field(100, description="linear warm-up, optimiser steps")
    decay_fraction: Fraction = Field(
        0.0, description="last share of the run in which lr falls linearly to 0"
    )
    clip_norm: PositiveFloat = Field(50.0, description="gradient norm, applied after warm-up")
    groups: list[ParameterGroupConfig] = Field(
        [], description="exceptions; a parameter belongs to the first that matches its name"
    )


class TrainingConfig(_Section):
    """Length, batch and cadence."""

    steps: Positive = Field(3000, description="optimiser steps")
    batch_size: Positive = Field(256, description="samples an optimiser step, over all workers")
    micro_batch_size: Positive = Field(
        2, description="samples a forward pass; results depend on it, not on the worker count"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint_every: Positive = Field(250, description="optimiser steps")
    keep_last: Positive = Field(2, description="newest checkpoints kept")
    keep_every: Positive | None = Field(
        None, description="checkpoints of these optimiser steps are kept for good; null: none"
    )
    keep_best: NonNegative = Field(
        0,
        description="so many checkpoints with the lowest loss are kept as well, by the mean over "
        "the steps since the checkpoint before; 0: none",
    )
    max_skipped_steps: NonNegative = Field(
        0,
        description="steps with a non-finite loss or gradient that are skipped between two "
        "checkpoints before the run stops; 0 = stop at the first",
    )
    damaged_rows: Literal["stop", "replace"] = Field(
        "stop",
        description="a row group of the store that is missing or damaged: stop: the run stops and "
        "names it; replace: rows of later batches come in its rows' places, counted and told",
    )
    log_every: Positive = Field(10, description="optimiser steps between metric points")
    sample_every: NonNegative = Field(0, description="optimiser steps between pictures; 0 = never")

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size})"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}): no other step has a checkpoint to keep"
            )
        return self


class DeepSpeedConfig(_Section):
    """What ZeRO splits over the workers, and what lies in host memory."""

    stage: Literal[1, 2, 3] = Field(
        2, description="1: optimiser state; 2: and gradients; 3: and all weights, the base's too"
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="cpu: optimiser state and its step in host memory"
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none", description="cpu: split weights in host memory; stage 3"
    )
    bucket_values: Positive = Field(
        50_000_000, description="values that are reduced or gathered at once; a buffer of them"
    )

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


class RuntimeConfig(_Section):
    """Ray Train's workers. Changing any of these never changes a run's results."""

    num_workers: Annotated[
        Positive | tuple[Positive, Positive], Field(union_mode="left_to_right")
    ] = Field(
        1,
        description="training processes; or [fewest, most]: as many as the cluster has room "
        "for, also when it grows or shrinks",
    )
    use_gpu: bool = Field(False, description="one GPU a worker, and nccl instead of gloo")
    cpus_per_worker: PositiveFloat = Field(1.0, description="logical CPUs that Ray reserves")
    strategy: Literal["auto", "fsdp", "ddp", "deepspeed", "single"] = Field(
        "auto",
        description="fsdp: FSDP2 shards parameters over the workers; ddp: every worker has them "
        "all; deepspeed: ZeRO; auto: ddp if that is estimated to fit, else fsdp",
    )
    deepspeed: DeepSpeedConfig | None = Field(
        None, description="options of strategy = deepspeed; default: stage 2, nothing offloaded"
    )
    shard_size: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="workers that share one copy of the parameters under fsdp, e.g. a node's GPUs "
        "(HSDP); default: all",
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp: false keeps the student's blocks whole until their backward pass: one "
        "all-gather less, more memory",
    )
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="fsdp: cpu keeps shards, their gradients, the optimiser's state and its step "
        "in host memory",
    )
    context_parallel: Positive = Field(
        1,
        description="neighbouring workers that compute each micro-batch together, each a part of "
        "its tokens: for large pictures; num_workers is a multiple",
    )
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="what the backward pass computes again, for less memory: full: each block from "
        "its input; selective: all of a block but its matrix products and attention",
    )
    compile: bool = Field(
        False, description="torch.compile of each block; seconds to minutes at the start"
    )
    max_failures: int = Field(
        3, ge=-1, description="restarts from the last checkpoint; -1 = always"
    )
    worker_start_timeout: PositiveFloat = Field(
        1800.0, description="seconds until the workers must be up (GPU nodes take minutes)"
    )
    resize_interval: PositiveFloat = Field(
        60.0, description="seconds between looks whether a range of workers has room for more"
    )
    stall_timeout: PositiveFloat = Field(
        1800.0,
        description="seconds that a step may take, or the start before the first one (loading, "
        "compiling) or the last upload, before a worker counts as hanging and is restarted",
    )

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
            "reshard_after_forward": not self.reshard_after_forward,
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


_TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


class TrackingConfig(_Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking server; default: SQLite in the run folder")
    experiment: str = Field("piflow", description="created when missing")
    model_name: str | None = Field(None, description="registered model; default: the recipe's name")
    system_metrics: bool = Field(
        False,
        description="with the training metrics also system/*: CPU, memory, disk, network and GPUs "
        "of rank 0's machine",
    )

    @field_validator("uri")
    @classmethod
    def _is_a_server_or_database(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        kind, separator, rest = uri.partition("://")
        if not separator or kind.partition("+")[0] not in _TRACKING_SCHEMES or not rest:
            raise ValueError(
                "expected http(s)://host:port, a database's URI (postgresql://...) or "
                "sqlite:///path"
            )
        if kind in ("http", "https") and "@" in rest.partition("/")[0]:
            raise ValueError(
                "it holds a password, which would end up in logs; expected http(s)://host:port, "
                "with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return uri


class EvaluationConfig(_Section):
    """What `piflow evaluate` measures."""

    prompts: Positive = Field(64, description="how many prompts")
    prompt_list: str | None = Field(
        None,
        description="URI of a text file, taken evenly spaced; default: the smallest prompt ids",
    )
    seeds: Annotated[int, Field(ge=2)] = Field(4, description="pictures a prompt; held out")
    teacher_steps: Positive = Field(32, description="Euler steps of the reference")
    batch_size: Positive = Field(64, description="pictures drawn at once")
    retrieval: bool = Field(True, description="retrieval@1; needs the emoji pictures")


def _by_type(default: str) -> Discriminator:
    """Chooses a union's variant by its `type` key; without one it is `default`."""

    def tag(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("type", default)
        return value.type if isinstance(value, _Variant) else default

    return Discriminator(tag)


class Recipe(_Section):
    """One run, whole."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = Field(
        description="of the run and, unless tracking says otherwise, the registered model"
    )
    seed: NonNegative = Field(0, description="of weights, noise and the order of prompts")
    run_dir: str = Field(description="URI of the run's folder: checkpoints, samples, state")
    model: ModelConfig
    encoder: Annotated[
        Annotated[BertEncoderConfig, Tag("bert")]
        | Annotated[FluxEncoderConfig, Tag("flux")]
        | Annotated[Flux2EncoderConfig, Tag("flux2")]
        | Annotated[QwenImageEncoderConfig, Tag("qwen_image")]
        | Annotated[SD3EncoderConfig, Tag("sd3")]
        | Annotated[ClassLabelEncoderConfig, Tag("class_label")],
        _by_type("bert"),
    ]
    embed: EmbedConfig
    policy: Annotated[
        Annotated[GMFlowPolicyConfig, Tag("gmflow")] | Annotated[DXPolicyConfig, Tag("dx")],
        _by_type("gmflow"),
    ] = GMFlowPolicyConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    objective: Annotated[
        Annotated[PiIDConfig, Tag("pi_id")] | Annotated[FlowMatchingConfig, Tag("flow_matching")],
        _by_type("pi_id"),
    ] = PiIDConfig()
    lora: LoRAConfig | None = Field(
        LoRAConfig(), description="null: all of the student's weights are trained, not an adapter"
    )
    training: TrainingConfig = TrainingConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        micro_batches = self.training.batch_size // self.training.micro_batch_size
        most = micro_batches * self.runtime.context_parallel
        if most < self.runtime.max_workers:
            raise ValueError(
                f"training.batch_size / training.micro_batch_size = {micro_batches} micro-batches "
                f"a step are too few for runtime.num_workers = {self.runtime.num_workers}: every "
                f"worker needs one; use at most {most} workers"
            )
        taken = _ENCODERS[self.model.family]
        if self.encoder.type not in taken:
            raise ValueError(
                f"model.family = {self.model.family} doesn't go with encoder.type = "
                f"{self.encoder.type}; it takes {' or '.join(taken)}"
            )
        if self.embed.mode == "online" and self.training.damaged_rows == "replace":
            raise ValueError(
                "training.damaged_rows = replace is about a store's files, and embed.mode = online "
                "has none; leave one of them out"
            )
        if self.embed.mode == "online" and self.embed.image_column is not None:
            raise ValueError(
                "embed.mode = online encodes texts only, embed.image_column asks for pictures too; "
                "use embed.mode = store, or leave image_column empty"
            )
        if self.objective.pictures == "store" and self.embed.image_column is None:
            raise ValueError(
                "objective.pictures = store trains on pictures' latents in the embedding store, "
                "which has none without embed.image_column; name the column of the prompts file "
                "that holds the pictures"
            )
        if self.objective.pictures == "emoji" and self.embed.has_several_sizes:
            raise ValueError(
                "objective.pictures = emoji draws square pictures of one size; leave out "
                "embed.buckets, embed.height_column and embed.width_column"
            )
        if self.objective.pictures == "emoji" and self.embed.height != self.embed.width:
            raise ValueError(
                f"objective.pictures = emoji draws square pictures, embed is "
                f"{self.embed.height}x{self.embed.width}; set embed.height = embed.width"
            )
        if self.runtime.uses_deepspeed and self.training.optimizer.type != "adamw":
            raise ValueError(
                f"training.optimizer.type = {self.training.optimizer.type} needs each parameter's "
                "shape, and runtime.strategy = deepspeed lays them end to end and cuts anywhere; "
                "use adamw, or runtime.strategy fsdp or ddp"
            )
        replicated = self.runtime.max_workers == 1 or self.runtime.strategy == "ddp"
        if self.training.optimizer.type == "muon" and not replicated:
            raise ValueError(
                "training.optimizer.type = muon needs whole matrices, which strategy = "
                f"{self.runtime.strategy} may split over runtime.num_workers = "
                f"{self.runtime.num_workers}; use runtime.strategy ddp, adamw or one worker"
            )
        return self

    @model_validator(mode="after")
    def _fp8_has_a_teacher(self) -> Recipe:
        if self.model.fp8_teacher is not None and self.objective.type != "pi_id":
            raise ValueError(
                f"model.fp8_teacher is about a distillation's teacher and objective.type = "
                f"{self.objective.type} has none; leave it out"
            )
        if self.model.fp8_teacher is not None and self.runtime.compile:
            raise ValueError(
                "runtime.compile can't trace how model.fp8_teacher quantises a weight; leave out "
                "one of them"
            )
        return self

    @model_validator(mode="after")
    def _tokens_can_be_split(self) -> Recipe:
        size = self.runtime.context_parallel
        if size == 1:
            return self
        if self.model.family not in _SPLITTABLE:
            raise ValueError(
                f"runtime.context_parallel = {size} follows diffusers' plan of where a model's "
                f"tokens are split, and model.family = {self.model.family} has none "
                f"({', '.join(_SPLITTABLE)} do); leave it out"
            )
        if self.objective.type == "pi_id" and self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout = {self.lora.dropout} draws for whole samples, and "
                f"runtime.context_parallel = {size} workers have parts of one; use lora.dropout 0, "
                "or leave context_parallel out"
            )
        tokens = 0 if isinstance(self.encoder, ClassLabelEncoderConfig) else self.encoder.max_tokens
        if tokens % size:
            raise ValueError(
                f"encoder.max_tokens ({tokens}) must be a multiple of runtime.context_parallel "
                f"({size}), which deals them out evenly; use another number"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides a run's results: the recipe less where, how fast and how long it runs."""
        tree = self.model_dump(mode="json", exclude=_NOT_IDENTITY)
        if self.embed.image_column is None:  # how pictures are stored then decides nothing
            del tree["embed"]["image_column"], tree["embed"]["latent_dtype"]
        if self.training.optimizer.decay_fraction:  # the learning rate then depends on the length
            tree["training"]["steps"] = self.training.steps
        return tree

    def hash(self) -> str:
        """sha256 (16 hex digits) of `identity()`."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe, every default filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_ENCODERS = {  # the family's own; bert is for models that were trained with it
    "flux": ("flux", "bert"),
    "flux2": ("flux2", "bert"),
    "qwen_image": ("qwen_image", "bert"),
    "sd3": ("sd3", "bert"),
    "dit": ("class_label",),
}
_SPLITTABLE = ("flux", "flux2", "qwen_image")  # families with a plan for context parallelism
_NOT_IDENTITY: dict[str, Any] = {
    "model": {"fp8_teacher": {"check_every", "max_error"}},
    "run_dir": True,
    "runtime": True,
    "tracking": True,
    "evaluation": True,
    "embed": {"mode", "store", "encoders", "gpus_per_encoder", "bad_pictures", "max_bad_pictures"},
    "training": {
        "steps",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "keep_best",
        "max_skipped_steps",
        "damaged_rows",
        "log_every",
        "sample_every",
    },
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `key.sub=value` overrides, validate.

    Args:
        path: a YAML file.
        overrides: dotted keys with YAML values, e.g. ``training.optimizer.lr=1e-4``.

    Raises:
        RecipeError: the file is missing or isn't a YAML mapping, or a key or value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe not found: {path}; recipes shipped with piflow: {_shipped()}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} must hold a mapping of sections, found {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe's tree of plain values.

    Raises:
        RecipeError: names each wrong key, the value that came and what is allowed.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
        raise RecipeError(f"{source} has {error.error_count()} problem(s):\n{problems}") from error


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two identities, with both values."""
    mine, other = flatten(ours), flatten(theirs)
    return [
        f"{key}: {mine.get(key, '(absent)')!r} here, {other.get(key, '(absent)')!r} there"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(
            f"--set expects key=value, got {override!r}; example: --set training.steps=500"
        )
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:  # absent, or a section's bare name
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: {parent!r} is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from error


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in location if part not in _VARIANTS) or "(whole recipe)"
    if problem["type"] == "extra_forbidden":
        return (
            f"unknown key {key!r}; allowed here: {', '.join(_section(location[:-1]).model_fields)}"
        )
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{key}.type: expected one of {context['expected_tags']}; got {context['tag']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if not isinstance(problem["input"], dict):
        message = f"{message}; got {problem['input']!r}"
    return f"{key}: {message}"


_VARIANTS: dict[str, type[_Section]] = {
    "bert": BertEncoderConfig,
    "flux": FluxEncoderConfig,
    "flux2": Flux2EncoderConfig,
    "qwen_image": QwenImageEncoderConfig,
    "sd3": SD3EncoderConfig,
    "class_label": ClassLabelEncoderConfig,
    "gmflow": GMFlowPolicyConfig,
    "dx": DXPolicyConfig,
    "pi_id": PiIDConfig,
    "flow_matching": FlowMatchingConfig,
}


def _section(location: list[str]) -> type[BaseModel]:
    """The section at `location`; a variant's tag stands in it after the union's key."""
    section: Any = Recipe
    for part in location:
        if part in _VARIANTS:
            section = _VARIANTS[part]
        elif not part.isdigit():  # a number is a place in a list
            annotation = section.model_fields[part].annotation
            members = [item for item in get_args(annotation) if item is not type(None)]
            section = members[0] if members else annotation  # of a list or an optional section
    return section


def _shipped() -> str:
    folder = Path(__file__).parent.parent / "pipelines" / "recipes"
    return ", ".join(sorted(str(item) for item in folder.glob("*.yaml"))) or "none"
