"""The models of a recipe: the teacher and the student's adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from piflow import storage
from piflow.config.family import find_family
from piflow.config.section import (
    Operational,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Text,
    Uri,
)

ComputeDtype = Literal["base", "float32"]
LoRAInit = Literal["kaiming", "gaussian"]
BaseWeights = Literal["int8", "nf4"]
MAX_FRAMES = 1025  # of a video
GgufType = Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
"""Ways to pack a weight in GGUF that its library writes and diffusers reads: bits a value."""


class Fp8TeacherConfig(Section):
    """The teacher's matrix products in 8 bits; the student keeps its precision.

    The results depend on it, the less the smaller the measured error is.
    """

    keep_weights: Operational[bool | None] = None
    """Whether the base's 8-bit weights are kept beside it, a byte a value, instead of made anew in
    every call; shards of them are gathered in 8 bits. null: where they are estimated to fit, and
    the model is spread so that they can be. The values are the same either way.
    """

    check_every: Operational[Positive] = 250
    """Optimiser steps between measurements of the teacher's error."""

    max_error: Operational[PositiveFloat] = 0.1
    """Relative L2 error of its velocity, against the base's own precision, above which the run
    stops.
    """


class TeacherLoRAConfig(Section):
    """Somebody's LoRA that the teacher has on top of the base, and with it the student."""

    path: Uri
    """URI (local, s3://, hf://owner/repo/file) of one safetensors file, in a layout that diffusers
    reads for the family.
    """

    strength: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """Factor of what it adds to the base's weights; 1 is as it was trained."""

    @field_validator("path")
    @classmethod
    def _is_safetensors(cls, path: str) -> str:
        if not storage.base_name(path).endswith(".safetensors"):
            raise ValueError(
                f"expected one .safetensors file (pickled weights are never read), got {path}"
            )
        return path

    @field_validator("strength")
    @classmethod
    def _counts(cls, strength: float) -> float:
        if strength == 0:
            raise ValueError("strength 0 is the base alone: leave model.lora out")
        return strength


class ModelConfig(Section):
    """The teacher: one diffusers transformer and the codec between pictures and its latents."""

    family: str = "flux"
    """The architecture: flux (FLUX.1), flux_kontext (FLUX.1-Kontext, which edits pictures), flux2,
    flux2_klein, qwen_image, qwen_image_edit (edits pictures, too), sd3 (Stable Diffusion 3 and
    3.5), z_image, wan (Wan 2.1, which makes videos), dit (class-conditional DiT); or one of another
    package, by the name of its `piflow.families` entry point, its module or module:attribute.
    """

    path: Uri
    """URI (local, s3://, hf://) of its folder: config.json and safetensors files."""

    codec: Literal["pixels", "vae"] = "pixels"
    """pixels: RGB, space-to-depth by 2, 12 latent channels; or the VAE."""

    vae: Uri | None = None
    """URI of the VAE's folder; default: `vae` beside the transformer's."""

    frames: Annotated[int, Field(gt=0, le=MAX_FRAMES)] | None = None
    """Frames of a video, of families that make some: 1 more than a multiple of 4 with Wan's VAE;
    null: as many as the family's published videos have.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The frozen base's dtype."""

    base_weights: BaseWeights | None = None
    """What the weights of the frozen base's linear layers, those of its blocks, are kept in, for
    teacher and student alike, and whole for one product at a time (needs torchao). int8: a byte a
    value, with a scale a row; nf4: half a byte, with a scale for 64 values; null: in `dtype`, what
    products are computed in anyway.
    """

    fp8_teacher: Fp8TeacherConfig | None = None
    """{} or its options: the teacher's velocity in fp8 (needs torchao, and a GPU of compute
    capability 8.9); null: in `dtype`.
    """

    lora: TeacherLoRAConfig | None = None
    """{path: URI, strength: 1.0}: the teacher is the base with this LoRA; null: the base alone."""

    @field_validator("family")
    @classmethod
    def _is_found(cls, name: str) -> str:
        find_family(name)
        return name

    @model_validator(mode="after")
    def _frames_are_a_videos(self) -> ModelConfig:
        if self.frames is None:
            return self
        if find_family(self.family).video is None:
            raise ValueError(
                f"frames = {self.frames} is about videos, and family = {self.family} makes "
                "pictures; leave it out"
            )
        _ = self.latent_frames  # a VAE doesn't take every number
        return self

    @property
    def num_frames(self) -> int:
        """Frames of a sample: a picture has one."""
        video = find_family(self.family).video
        if video is None:
            return 1
        return video.frames if self.frames is None else self.frames

    @property
    def latent_frames(self) -> int:
        """Frames of a sample's latents, which lie one below the other.

        Raises:
            ValueError: the frames of the video aren't a whole number of these.
        """
        video = find_family(self.family).video
        if video is None or self.codec == "pixels":
            return self.num_frames
        return video.latent_frames(self.num_frames)


class LoRAConfig(Section):
    """The student's adapter; alpha = rank."""

    rank: Positive = 256
    """Rank of every adapted layer."""

    dropout: Probability = 0.05
    """On the adapter's input, in training."""

    targets: list[Text] | None = None
    """Module name suffixes; default: the family's own."""

    init: LoRAInit = "kaiming"
    """What A is drawn from; B is zero. gaussian: N(0, 1/rank²), as the published trainer; kaiming:
    uniform of variance 1 / (3 inputs), PEFT's default, 3 to 9 times larger at rank 256.
    """

    compute_dtype: ComputeDtype = "base"
    """What its matrix products are computed in. base: in `model.dtype`, as the published trainer
    does; weights, gradients and their sums stay in float32. float32 costs a GPU with bfloat16
    tensor cores about as much time again as the rest of the student.
    """
