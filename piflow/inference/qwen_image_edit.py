"""Qwen-Image-Edit in a few steps."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from piflow.backbones.qwen_image_edit.backbone import QwenImageEditBackbone
from piflow.inference.base import (
    FewStepPipeline,
    few_step_call,
    refuse_sigmas,
    require_picture,
)
from piflow.inference.in_place import PackedTokens
from piflow.inference.qwen_image import settle_guidance

_AREA = 1024 * 1024  # pixels of a picture whose size the call doesn't say


class PiQwenImageEditPipeline(FewStepPipeline, QwenImageEditPipeline):
    """`QwenImageEditPipeline` with a few-step student: the same call, in the trained steps.

    `image` is the picture to be edited, without which the student was never trained. A negative
    prompt is refused at the default `true_cfg_scale` of 4 as at any above 1: the student has its
    teacher's guidance learnt.

    Args:
        adapter: folder or URI of the student's adapter. All others are `QwenImageEditPipeline`'s; a
            scheduler that isn't a `FlowMapScheduler` is replaced by the student's.

    Raises:
        ValueError: no adapter, or one that doesn't fit the transformer.
    """

    backbone_class = QwenImageEditBackbone
    takes_float32 = True

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        processor: Qwen2VLProcessor,
        transformer: QwenImageTransformer2DModel,
        adapter: str | None = None,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, processor, transformer)
        self._add_student(adapter, transformer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        adapter: str | PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """As the other few-step pipelines; a folder's processor is loaded without torchvision too.

        Raises:
            ValueError: as `FewStepPipeline.from_pretrained`.
        """
        from piflow.backbones.qwen_image_edit.processor import load_processor

        place = fspath(pretrained_model_name_or_path)
        in_folder = "://" in place or Path(place).is_dir()
        if "processor" not in options and in_folder and not is_torchvision_available():
            options["processor"] = load_processor(place, padding_side=None)
        return super().from_pretrained(place, adapter, **options)

    __call__ = few_step_call(QwenImageEditPipeline, num_inference_steps=None)

    def _reader(self, arguments: dict[str, Any]) -> PackedTokens:
        settle_guidance(arguments)
        refuse_sigmas(arguments)
        require_picture(arguments)
        return self._packed_tokens({**arguments, **self._size(arguments)})

    def _size(self, arguments: dict[str, Any]) -> dict[str, int]:
        """Height and width as the family's call takes them, of the picture where it says none."""
        image, patch = arguments["image"], 2 * self.vae_scale_factor
        columns, rows = (image[0] if isinstance(image, list) else image).size
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(_AREA, columns / rows)
        wanted = {"height": arguments["height"] or height, "width": arguments["width"] or width}
        return {name: side // patch * patch for name, side in wanted.items()}
