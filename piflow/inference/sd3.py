"""Stable Diffusion 3 and 3.5 in a few steps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5Tokenizer,
)

from piflow.backbones.sd3.backbone import SD3Backbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_guidance, refuse_sigmas
from piflow.inference.in_place import PlainLatents


class PiSD3Pipeline(FewStepPipeline, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with a few-step student: the same call, in the trained steps.

    `guidance_scale` above 1 is refused: the student has its teacher's guidance learnt. So are
    pictures for an IP adapter, which the teacher was distilled without.

    Args:
        adapter: folder or URI of the student's adapter. All others are
            `StableDiffusion3Pipeline`'s; a scheduler that isn't a `FlowMapScheduler` is replaced by
            the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = SD3Backbone
    takes_float32 = True

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: Any,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5Tokenizer,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: SiglipImageProcessor | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(
            transformer,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
            image_encoder,  # type: ignore[arg-type]
            feature_extractor,  # type: ignore[arg-type]
        )
        self._add_student(adapter, transformer)

    __call__ = few_step_call(StableDiffusion3Pipeline, num_inference_steps=None, guidance_scale=1.0)

    def _reader(self, arguments: dict[str, Any]) -> PlainLatents:
        refuse_guidance(arguments, "guidance_scale", ())
        refuse_sigmas(arguments)
        names = ("ip_adapter_image", "ip_adapter_image_embeds", "joint_attention_kwargs")
        given = [name for name in names if arguments[name] is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: the student's transformer takes prompts alone, as in its "
                "training; leave it out"
            )
        return PlainLatents(self._student.head)

    def _sampling_transformer(self) -> SD3StudentTransformer:
        return SD3StudentTransformer(self._student.module, self.transformer)


class SD3StudentTransformer:
    """What `StableDiffusion3Pipeline`'s loop asks of its transformer, for a student's module.

    Args:
        module: (latents, 1000 sigma (B,), text states, pooled) -> tokens (B, HW/4, F).
        base: whose config and dtype it has.
    """

    def __init__(self, module: nn.Module, base: Any) -> None:
        self._module = module
        self.dtype: torch.dtype = base.dtype
        self.config = base.config

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        joint_attention_kwargs: None,
        return_dict: bool,
    ) -> tuple[Tensor]:
        """`SD3Transformer2DModel`'s call; what it returns is the tokens."""
        inputs = (hidden_states, encoder_hidden_states, pooled_projections)
        latents, text, pooled = (tensor.to(self.dtype) for tensor in inputs)
        tokens: Tensor = self._module(latents, timestep, text, pooled)
        return (tokens,)
