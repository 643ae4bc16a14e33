"""The models of a recipe: the teacher, its text encoder and the student's adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from piflow.config.section import Operational, Positive, PositiveFloat, Section, Variant


class Fp8TeacherConfig(Section):
    """The teacher's matrix products in 8 bits, at no more memory; the student keeps its precision.

    The results depend on it, the less the smaller the measured error is.
    """

    check_every: Operational[Positive] = 250
    """Optimiser steps between measurements of the teacher's error."""

    max_error: Operational[PositiveFloat] = 0.1
    """Relative L2 error of its velocity, against the base's own precision, above which the run
    stops.
    """


class ModelConfig(Section):
    """The teacher: one diffusers transformer and the codec between pictures and its latents."""

    family: Literal["flux", "flux2", "qwen_image", "sd3", "dit"] = "flux"
    """The architecture: FLUX.1, FLUX.2, Qwen-Image, Stable Diffusion 3(.5), or class-conditional
    DiT.
    """

    path: str
    """URI (local, s3://, hf://) of its folder: config.json and safetensors files."""

    codec: Literal["pixels", "vae"] = "pixels"
    """pixels: RGB, space-to-depth by 2, 12 latent channels; or the VAE."""

    vae: str | None = None
    """URI of the VAE's folder; default: `vae` beside the transformer's."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The frozen base's dtype."""

    fp8_teacher: Fp8TeacherConfig | None = None
    """{} or its options: the teacher's velocity in fp8 (needs torchao, and a GPU of compute
    capability 8.9); null: in `dtype`.
    """


class BertEncoderConfig(Variant):
    """A BERT-like text encoder: token states, and their mean as the pooled vector."""

    type: Literal["bert"] = "bert"
    path: str
    """URI of a transformers folder (config, tokenizer, weights)."""

    max_tokens: Positive = 64
    """Tokens a prompt is padded or truncated to."""


class FluxEncoderConfig(Variant):
    """FLUX.1's two text encoders: T5 for token states, CLIP for the pooled vector."""

    type: Literal["flux"] = "flux"
    path: str
    """URI of a folder with text_encoder(_2) and tokenizer(_2)."""

    max_tokens: Positive = 512
    """T5 tokens a prompt is padded or truncated to."""

    padding: Literal["keep", "drop"] = "keep"
    """keep: all max_tokens states, as FluxPipeline feeds; drop: only the prompt's, zeros elsewhere
    (10-40 times smaller store, another conditioning than the pipeline's).
    """


class Flux2EncoderConfig(Variant):
    """FLUX.2's text encoder: Mistral 3 after the family's system message, three layers' states."""

    type: Literal["flux2"] = "flux2"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens, with the system message's, that a prompt is padded or cut to."""


class QwenImageEncoderConfig(Variant):
    """Qwen-Image's text encoder: Qwen2.5-VL under the family's template."""

    type: Literal["qwen_image"] = "qwen_image"
    path: str
    """URI of a folder with text_encoder and tokenizer."""

    max_tokens: Positive = 512
    """Tokens after the template's, at most 1024."""


class SD3EncoderConfig(Variant):
    """Stable Diffusion 3's encoders: two CLIP models' states, then T5's; CLIP's pooled vectors."""

    type: Literal["sd3"] = "sd3"
    path: str
    """URI of a folder with text_encoder(_2, _3), tokenizer(_2, _3)."""

    max_tokens: Positive = 256
    """T5 tokens a prompt is padded or truncated to."""

    padding: Literal["keep", "drop"] = "keep"
    """keep: all states, as StableDiffusion3Pipeline feeds; drop: of T5 only the prompt's, zeros
    elsewhere (a smaller store, another conditioning than the pipeline's).
    """


class ClassLabelEncoderConfig(Variant):
    """No text: a prompt is a class number; the empty prompt is the null class."""

    type: Literal["class_label"] = "class_label"
    num_classes: Positive = 1000
    """Prompts are 0 .. num_classes - 1."""


EncoderConfig = (
    BertEncoderConfig
    | FluxEncoderConfig
    | Flux2EncoderConfig
    | QwenImageEncoderConfig
    | SD3EncoderConfig
    | ClassLabelEncoderConfig
)


class LoRAConfig(Section):
    """The student's adapter; alpha = rank."""

    rank: Positive = 256
    """Rank of every adapted layer."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """On the adapter's input, in training."""

    targets: list[str] | None = None
    """Module name suffixes; default: the family's own."""
