"""FLUX.1 in a few steps."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5Tokenizer,
)

from piflow.backbones.flux import FAMILY
from piflow.backbones.flux.backbone import FluxBackbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_guidance, refuse_sigmas
from piflow.inference.in_place import PackedTokens

NEGATIVE = (
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class PiFluxPipeline(FewStepPipeline, FluxPipeline):
    """`FluxPipeline` with a few-step student: the same call, by default in the trained steps.

    `guidance_scale` is FLUX.1-dev's embedded guidance; by default what the student was trained
    with. True classifier-free guidance is refused: the student has its teacher's learnt.

    Args:
        adapter: folder or URI of the student's adapter. All others are `FluxPipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = FluxBackbone
    takes_float32 = True

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5Tokenizer,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,  # type: ignore[arg-type]
            feature_extractor,  # type: ignore[arg-type]
        )
        self._add_student(adapter, transformer)

    __call__ = few_step_call(FluxPipeline, num_inference_steps=None, guidance_scale=None)

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        refuse_guidance(arguments, "true_cfg_scale", NEGATIVE)
        refuse_sigmas(arguments)
        self._fill_in_guidance(arguments, FAMILY)
        return self._packed_tokens(arguments)
