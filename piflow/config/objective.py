"""What is trained: the student's policy, the teacher's guidance and the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piflow.config.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Variant,
)

Shift = Annotated[float, Field(ge=1e-3, le=1e3)]


class GMFlowPolicyConfig(Variant):
    """A Gaussian mixture per latent pixel (arXiv 2510.14974, section 3)."""

    type: Literal["gmflow"] = "gmflow"
    num_gaussians: Annotated[int, Field(ge=1, le=1000)] = 8
    """Mixture components K."""

    logstd_inner_dim: Positive = 1024
    """Width of the log-std MLP."""

    num_logstd_layers: Literal[2] = 2
    """Layers of the log-std MLP."""

    dropout: Probability = 0.1
    """Probability that a component is dropped in training rollouts."""


class DXPolicyConfig(Variant):
    """x0 as a function of time over a segment (arXiv 2510.14974, section 3)."""

    type: Literal["dx"] = "dx"
    mode: Literal["grid", "polynomial", "velocity_polynomial"] = "grid"
    """grid: values interpolated linearly in tau; polynomial: coefficients of x0 in tau_src - tau,
    as published; velocity_polynomial: coefficients of the velocity, piflow's own, which others
    can't load."""

    num_points: Annotated[int, Field(ge=1, le=1000)] = 10
    """Grid values or coefficients, N_g."""


PolicyConfig = GMFlowPolicyConfig | DXPolicyConfig


class GuidanceConfig(Section):
    """How the teacher is guided."""

    scale: NonNegativeFloat = 1.0
    """Classifier-free guidance; 1 = off."""

    interval: tuple[Fraction, Fraction] = Field((0.0, 1.0), strict=False)
    """Sigma range in which guidance is on."""

    orthogonal: Fraction = 0.0
    """Share of the parallel part that is projected out."""

    keep_norm: bool = False
    """Scale each token's guided velocity to the norm that it has under the prompt alone, as the
    pipelines of Qwen-Image do; of families whose tokens are patches of 2x2.
    """

    embedded: NonNegativeFloat | None = None
    """FLUX's guidance input."""

    negative_prompt: str = ""
    """The other side of classifier-free guidance; `piflow embed` encodes it."""

    @model_validator(mode="after")
    def _interval_has_an_order(self) -> GuidanceConfig:
        low, high = self.interval
        if low > high:
            raise ValueError(
                f"interval is [{low}, {high}]; expected [lowest, highest] sigma, so [{high}, {low}]"
            )
        return self


class PiIDConfig(Variant):
    """π-ID: policy-based imitation distillation (arXiv 2510.14974, section 4)."""

    type: Literal["pi_id"] = "pi_id"
    data: Literal["free", "dependent"] = "free"
    """free: from noise, all segments; dependent: from noised pictures, one."""

    pictures: Literal["store", "emoji"] | None = None
    """Where pictures of the prompts come from, for data = dependent: their latents from the
    embedding store (embed.image_column), or drawn emoji.
    """

    nfe: Annotated[int, Field(ge=1, le=64)] = 4
    """Network evaluations, N."""

    final_step_size_scale: Annotated[float, Field(ge=1e-3, le=1)] = 0.5
    """Length of the last segment in tau, relative to the others."""

    shift: Shift = 3.2
    """Time shift s of the noise schedule."""

    total_substeps: Annotated[int, Field(ge=1, le=10_000)] = 128
    """Policy substeps over tau in [0, 1]."""

    substep_rounding: Literal["nearest", "up"] = "nearest"
    """How an interval's share of them becomes whole. nearest: as the released students were
    trained; up: as the newest published trainer has it.
    """

    num_intermediate_states: Annotated[int, Field(ge=1, le=1000)] = 4
    """Teacher evaluations a segment, J."""

    window_substeps: NonNegative = 3
    """Micro-window, in substeps of a segment."""

    num_decay_iters: NonNegative = 2000
    """Steps until lambda is 0; 0 = on-policy."""

    loss_scale: PositiveFloat = 30.0
    """Factor of the loss."""

    @model_validator(mode="after")
    def _has_pictures(self) -> PiIDConfig:
        if (self.data == "dependent") != (self.pictures is not None):
            raise ValueError(
                f"data = {self.data} goes with {'a' if self.data == 'dependent' else 'no'} source "
                f"of pictures, pictures is {self.pictures}; set both or neither"
            )
        return self


class FlowMatchingConfig(Variant):
    """Flow-matching pre-training of a small teacher: all weights, velocity target."""

    type: Literal["flow_matching"] = "flow_matching"
    pictures: Literal["store", "emoji"] = "emoji"
    """Where pictures of the prompts come from: their latents from the embedding store
    (embed.image_column), or drawn emoji.
    """

    shift: Shift = 1.0
    """Time shift of the sampler in evaluation."""

    logit_mean: Annotated[float, Field(ge=-100, le=100)] = 0.3
    """Mean of the normal variable whose sigmoid is the noise level sigma."""

    logit_std: PositiveFloat = 1.0
    """Standard deviation of that variable."""

    prompt_dropout: Fraction = 0.1
    """Share trained on the empty prompt, for CFG."""
