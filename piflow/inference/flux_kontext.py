"""FLUX.1-Kontext in a few steps."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5Tokenizer,
)

from piflow.backbones.flux_kontext import FAMILY
from piflow.backbones.flux_kontext.backbone import FluxKontextBackbone
from piflow.inference.base import (
    FewStepPipeline,
    few_step_call,
    refuse_guidance,
    refuse_sigmas,
    require_picture,
)
from piflow.inference.flux import NEGATIVE
from piflow.inference.in_place import PackedTokens


class PiFluxKontextPipeline(FewStepPipeline, FluxKontextPipeline):
    """`FluxKontextPipeline` with a few-step student: the same call, in the trained steps.

    `image` is the picture to be edited, without which the student was never trained.
    `guidance_scale` is the model's embedded guidance; by default what the student was trained with.
    True classifier-free guidance is refused: the student has its teacher's learnt.

    Args:
        adapter: folder or URI of the student's adapter. All others are `FluxKontextPipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = FluxKontextBackbone
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

    __call__ = few_step_call(FluxKontextPipeline, num_inference_steps=None, guidance_scale=None)

    def call_arguments(self, prompt: str, height: int, width: int) -> dict[str, Any]:
        """Less `image`; the family's call would make other sizes of its own of 1024×1024 pixels."""
        arguments = super().call_arguments(prompt, height, width)
        return {**arguments, "max_area": height * width}

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        refuse_guidance(arguments, "true_cfg_scale", NEGATIVE)
        refuse_sigmas(arguments)
        require_picture(arguments)
        self._fill_in_guidance(arguments, FAMILY)
        return self._packed_tokens({**arguments, **self._fitted_size(arguments)})

    def _fitted_size(self, arguments: dict[str, Any]) -> dict[str, int]:
        """Height and width as the family's call fits them to `max_area`, by the same roundings."""
        default = self.default_sample_size * self.vae_scale_factor
        ratio = (arguments["width"] or default) / (arguments["height"] or default)
        area, patch = arguments["max_area"], 2 * self.vae_scale_factor
        height, width = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        return {"height": height // patch * patch, "width": width // patch * patch}
