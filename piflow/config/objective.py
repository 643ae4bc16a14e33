"""What is trained: the student's policy, the teacher's guidance and the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piflow.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section, Variant


class GMFlowPolicyConfig(Variant):
    """A Gaussian mixture per latent pixel (arXiv 2510.14974, section 3)."""

    type: Literal["gmflow"] = "gmflow"
    num_gaussians: Positive = Field(8, description="mixture components K")
    logstd_inner_dim: Positive = Field(1024, description="width of the log-std MLP")
    num_logstd_layers: Literal[2] = Field(2, description="layers of the log-std MLP")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="probability that a component is dropped in training rollouts"
    )


class DXPolicyConfig(Variant):
    """x0 as a function of time over a segment (arXiv 2510.14974, section 3)."""

    type: Literal["dx"] = "dx"
    mode: Literal["grid", "polynomial"] = Field(
        "grid", description="values interpolated linearly in tau, or a polynomial's coefficients"
    )
    num_points: Positive = Field(10, description="grid values or coefficients, N_g")


PolicyConfig = GMFlowPolicyConfig | DXPolicyConfig


class GuidanceConfig(Section):
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


class PiIDConfig(Variant):
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


class FlowMatchingConfig(Variant):
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
