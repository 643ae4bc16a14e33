"""Qwen-Image-Edit: Qwen-Image's architecture, which is shown a picture and edits it."""

from __future__ import annotations

from typing import Literal

from piflow.config import ConditionSizes, Family, Published, TextEncoderConfig
from piflow.config.section import Positive

_AREA = 1024 * 1024  # pixels of the picture that the published pipeline shows its model
_PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")


class QwenImageEditEncoderConfig(TextEncoderConfig):
    """Qwen-Image-Edit's text encoder: Qwen2.5-VL reads the picture, then the prompt."""

    module = "piflow.backbones.qwen_image_edit.text"
    tiny = "piflow.backbones.qwen_image_edit.tiny"
    reads_pictures = True

    type: Literal["qwen_image_edit"] = "qwen_image_edit"
    path: str
    """URI of a folder with text_encoder, tokenizer and processor."""

    max_tokens: Positive = 2048
    """Tokens after the template's, at most 4096: about 1400 of a picture, those of the prompt, and
    those that the negative prompt adds.
    """

    def check_prompt(self, prompt: str) -> None:
        """Refuses the marks in whose place the encoder puts pictures.

        Raises:
            ValueError: names the prompt.
        """
        for mark in _PLACEHOLDERS:
            if mark in prompt:
                raise ValueError(
                    f"prompt {prompt!r} has {mark}, in whose place the encoder puts a picture; "
                    "take it out"
                )


FAMILY = Family(
    backbone="piflow.backbones.qwen_image_edit.backbone:QwenImageEditBackbone",
    encoders=(QwenImageEditEncoderConfig,),
    vaes=("AutoencoderKLQwenImage",),
    masks_text=True,
    edits=ConditionSizes(area=_AREA),
    tiny="piflow.backbones.qwen_image_edit.tiny",
    pipeline="piflow.inference.qwen_image_edit:PiQwenImageEditPipeline",
    lora_files="diffusers.loaders.lora_pipeline:QwenImageLoraLoaderMixin",
    published=Published("Qwen-Image-Edit", repository="Qwen/Qwen-Image-Edit"),
)
