"""How long and how it is trained: optimiser, average, batch and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piflow.config.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Operational,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Uri,
)


class EMAConfig(Section):
    """beta_t = (1 - 1/t)^(gamma + 1), counted from `start`; or a fixed beta."""

    gamma: PositiveFloat = 7.0
    """Larger follows the weights faster."""

    beta: Probability | None = None
    """A constant share of the old average, e.g. 0.999, in place of gamma."""

    start: NonNegative = 100
    """Optimiser step at which averaging starts."""


class ParameterGroupConfig(Section):
    """Trainable parameters with a learning rate or weight decay of their own."""

    match: Annotated[str, Field(min_length=1)]
    """Shell pattern of parameter names, e.g. 'proj_out_*' or '*.lora_B.weight'."""

    lr_scale: NonNegativeFloat = 1.0
    """Factor of the learning rate."""

    weight_decay: NonNegativeFloat | None = None
    """Default: the optimiser's."""


class OptimizerConfig(Section):
    """AdamW; or Muon on the weight matrices and AdamW on the rest (whole ones: no shards)."""

    type: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: both moments in 8 bits (torchao); muon: not sharded."""

    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""

    betas: tuple[Probability, Probability] = Field((0.9, 0.95), strict=False)
    """AdamW's two decay rates, each below 1."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, times lr a step."""

    warmup_steps: NonNegative = 100
    """Linear warm-up, optimiser steps."""

    warmup_start: Fraction | None = None
    """First factor of the learning rate, which reaches 1 after `warmup_steps` steps, 0.001 in the
    published trainer; null: one step's share of it.
    """

    decay_fraction: Fraction = 0.0
    """Last share of the run in which lr falls linearly to 0."""

    clip_norm: PositiveFloat = 50.0
    """Gradient norm, applied after warm-up."""

    groups: list[ParameterGroupConfig] = []
    """Exceptions; a parameter belongs to the first that matches its name."""


class TrainingConfig(Section):
    """Length, batch and cadence."""

    steps: Operational[Positive] = 3000
    """Optimiser steps."""

    batch_size: Positive = 256
    """Samples an optimiser step, over all workers."""

    micro_batch_size: Positive = 2
    """Samples a forward pass; results depend on it, not on the worker count."""

    init_from: Uri | None = None
    """URI (local, s3://, hf://) of an adapter's folder that the student begins as, LoRA and head:
    of the same base, rank and head, by piflow or published. It is read at every start of the run.
    Default: the student begins as its teacher.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint_every: Operational[Positive] = 250
    """Optimiser steps."""

    keep_last: Operational[Positive] = 2
    """Newest checkpoints kept."""

    keep_every: Operational[Positive | None] = None
    """Checkpoints of these optimiser steps are kept for good; null: none."""

    keep_best: Operational[NonNegative] = 0
    """So many checkpoints with the lowest loss are kept as well, by the mean over the steps since
    the checkpoint before; 0: none.
    """

    max_skipped_steps: Operational[NonNegative] = 0
    """Steps with a non-finite loss or gradient that are skipped between two checkpoints before the
    run stops; 0 = stop at the first.
    """

    damaged_rows: Operational[Literal["stop", "replace"]] = "stop"
    """A row group of the store that is missing or damaged: stop: the run stops and names it;
    replace: rows of later batches come in its rows' places, counted and told.
    """

    log_every: Operational[Positive] = 10
    """Optimiser steps between metric points."""

    sample_every: Operational[NonNegative] = 0
    """Optimiser steps between pictures; 0 = never."""

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
