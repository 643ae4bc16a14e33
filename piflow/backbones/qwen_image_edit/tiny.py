"""A tiny random Qwen-Image-Edit: Qwen-Image's, with Qwen2.5-VL's picture part, in its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from piflow.backbones import tiny
from piflow.backbones.qwen_image import tiny as qwen_image
from piflow.backbones.qwen_image_edit import QwenImageEditEncoderConfig
from piflow.backbones.qwen_image_edit.text import END, SYSTEM
from piflow.config import ConditionSizes, EncoderConfig, ModelConfig

_TOKEN = 28  # pixels of a side that a token of a picture stands for


def transformer(
    model: ModelConfig, encoder: EncoderConfig, size: int, guidance_embeds: bool
) -> Any:
    """`QwenImageTransformer2DModel`."""
    return qwen_image.transformer(model, encoder, size, guidance_embeds)


def vae(size: int) -> Any:
    """`AutoencoderKLQwenImage`."""
    return qwen_image.vae(size)


def pipeline(parts: dict[str, Any]) -> Any:
    """`QwenImageEditPipeline`, whose index names the published pipeline's processor."""
    from diffusers import QwenImageEditPipeline

    pipe: Any = QwenImageEditPipeline(scheduler=tiny.flow_scheduler(), **parts)
    pipe.register_to_config(processor=("transformers", "Qwen2VLProcessor"))
    return pipe


def text_parts(encoder: QwenImageEditEncoderConfig) -> list[tuple[str, Any]]:
    """Qwen2.5-VL, its tokenizer, and a processor that gives a picture at most four tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    from piflow.backbones.qwen_image_edit.processor import PictureProcessor

    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = qwen_image.qwen_tokenizer(SYSTEM + END, marks)
    start, end, picture, video = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    model = qwen_image.qwen_model(
        len(tokenizer),
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=picture,
        video_token_id=video,
    )
    pictures = Qwen2VLImageProcessorPil(min_pixels=_TOKEN**2, max_pixels=4 * _TOKEN**2)
    processor = PictureProcessor(pictures, tokenizer)
    return [("text_encoder", model), ("tokenizer", tokenizer), ("processor", processor)]


def own_parts(folder: Path) -> dict[str, Any]:
    """Parts that diffusers can't load by itself where there is no torchvision."""
    from piflow.backbones.qwen_image_edit.processor import load_processor

    return {"processor": load_processor(str(folder))}


@contextmanager
def small_pictures(sizes: ConditionSizes) -> Iterator[None]:
    """Has the pipeline scale pictures to these sizes, and not to a million pixels each."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as home

    def dimensions(area: float, ratio: float) -> tuple[int, int, None]:
        height, width = sizes.of(1000, round(1000 * ratio))
        return width, height, None

    with mock.patch.object(home, "calculate_dimensions", dimensions):
        yield
