"""How long and how it is trained: optimiser, average, batch and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piflow.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section


class EMAConfig(Section):
    """beta_t = (1 - 1/t)^(gamma + 1), counted from `start`; or a fixed beta."""

    gamma: PositiveFloat = Field(7.0, description="larger follows the weights faster")
    beta: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="a constant share of the old average, e.g. 0.999, in place of gamma"
    )
    start: NonNegative = Field(100, description="optimiser step at which averaging starts")


class ParameterGroupConfig(Section):
    """Trainable parameters with a learning rate or weight decay of their own."""

    match: Annotated[str, Field(min_length=1)] = Field(
        description="shell pattern of parameter names, e.g. 'proj_out_*' or '*.lora_B.weight'"
    )
    lr_scale: float = Field(1.0, ge=0, description="factor of the learning rate")
    weight_decay: float | None = Field(None, ge=0, description="default: the optimiser's")


class OptimizerConfig(Section):
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


class TrainingConfig(Section):
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
