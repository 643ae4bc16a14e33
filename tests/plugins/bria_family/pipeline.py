"""Bria in a few steps, by diffusers' own call."""

from typing import Any

from diffusers import AutoencoderKL, BriaPipeline, BriaTransformer2DModel
from transformers import T5EncoderModel, T5Tokenizer

from bria_family.backbone import BriaBackbone
from piflow.inference.base import FewStepPipeline, few_step_call, refuse_guidance
from piflow.inference.in_place import PackedTokens


class PiBriaPipeline(FewStepPipeline, BriaPipeline):
    """`BriaPipeline` with a few-step student."""

    backbone_class = BriaBackbone

    def __init__(
        self,
        transformer: BriaTransformer2DModel,
        scheduler: Any,
        vae: AutoencoderKL,
        text_encoder: T5EncoderModel,
        tokenizer: T5Tokenizer,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(
            transformer, scheduler, vae, text_encoder, tokenizer, image_encoder, feature_extractor
        )
        self._add_student(adapter, transformer)

    __call__ = few_step_call(BriaPipeline, num_inference_steps=None, guidance_scale=1.0)

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        refuse_guidance(arguments, "guidance_scale", ())
        default = self.default_sample_size * self.vae_scale_factor
        patch = self.vae_scale_factor  # this family's counts the 2x2 patches already
        height, width = arguments["height"] or default, arguments["width"] or default
        return PackedTokens(self._student.head, 2 * (height // patch), 2 * (width // patch))
