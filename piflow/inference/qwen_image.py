"""Qwen-Image in a few steps."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from piflow.backbones.qwen_image.backbone import QwenImageBackbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_guidance, refuse_sigmas
from piflow.inference.in_place import PackedTokens

NEGATIVE = ("negative_prompt", "negative_prompt_embeds")


class PiQwenImagePipeline(FewStepPipeline, QwenImagePipeline):
    """`QwenImagePipeline` with a few-step student: the same call, by default in the trained steps.

    A negative prompt is refused at the default `true_cfg_scale` of 4 as at any above 1: the student
    has its teacher's guidance learnt. Without one the scale means nothing, as in the family's own.

    Args:
        adapter: folder or URI of the student's adapter. All others are `QwenImagePipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = QwenImageBackbone
    takes_float32 = True

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
        adapter: str | None = None,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self._add_student(adapter, transformer)

    __call__ = few_step_call(QwenImagePipeline, num_inference_steps=None)

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        settle_guidance(arguments)
        refuse_sigmas(arguments)
        return self._packed_tokens(arguments)


def settle_guidance(arguments: dict[str, Any]) -> None:
    """Without a negative prompt the scale becomes 1, else the family warns that it does nothing.

    Raises:
        ValueError: as `refuse_guidance`.
    """
    refuse_guidance(arguments, "true_cfg_scale", NEGATIVE)
    if all(arguments[name] is None for name in NEGATIVE):
        arguments["true_cfg_scale"] = 1.0
