"""FLUX.2-klein in a few steps."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from piflow.backbones.flux2.backbone import Flux2Backbone
from piflow.inference.base import (
    FewStepPipeline,
    few_step_call,
    refuse_guidance,
    refuse_pictures,
    refuse_sigmas,
)
from piflow.inference.in_place import PackedTokens


class PiFlux2KleinPipeline(FewStepPipeline, Flux2KleinPipeline):
    """`Flux2KleinPipeline` with a few-step student: the same call, in the trained steps.

    `guidance_scale` above 1 is refused: the student has its teacher's guidance learnt. So are
    pictures to edit: the student was distilled from prompts alone.

    Args:
        adapter: folder or URI of the student's adapter. All others are `Flux2KleinPipeline`'s; a
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
        text_encoder: Qwen3ForCausalLM,
        tokenizer: Qwen2Tokenizer,
        transformer: Flux2Transformer2DModel,
        is_distilled: bool = False,
        adapter: str | None = None,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)
        self._add_student(adapter, transformer)

    __call__ = few_step_call(Flux2KleinPipeline, num_inference_steps=None, guidance_scale=1.0)

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        refuse_guidance(arguments, "guidance_scale", ())
        refuse_sigmas(arguments)
        refuse_pictures(arguments)
        return self._packed_tokens(arguments)
