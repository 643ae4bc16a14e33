"""FLUX.2 in a few steps."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from transformers import AutoProcessor, Mistral3ForConditionalGeneration

from piflow.backbones.flux2 import FAMILY
from piflow.backbones.flux2.backbone import Flux2Backbone
from piflow.inference.base import (
    FewStepPipeline,
    few_step_call,
    refuse_pictures,
    refuse_sigmas,
)
from piflow.inference.in_place import PackedTokens


class PiFlux2Pipeline(FewStepPipeline, Flux2Pipeline):
    """`Flux2Pipeline` with a few-step student: the same call, by default in the trained steps.

    `guidance_scale` is FLUX.2-dev's embedded guidance; by default what the student was trained
    with. Pictures to edit are refused: the student was distilled from prompts alone.

    Args:
        adapter: folder or URI of the student's adapter. All others are `Flux2Pipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = Flux2Backbone
    takes_float32 = True

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKLFlux2,
        text_encoder: Mistral3ForConditionalGeneration,
        tokenizer: AutoProcessor,
        transformer: Flux2Transformer2DModel,
        adapter: str | None = None,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self._add_student(adapter, transformer)

    __call__ = few_step_call(Flux2Pipeline, num_inference_steps=None, guidance_scale=None)

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        refuse_sigmas(arguments)
        refuse_pictures(arguments)
        self._fill_in_guidance(arguments, FAMILY)
        return self._packed_tokens(arguments)
