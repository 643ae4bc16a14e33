"""Qwen2-VL's processor for prompts with one picture each, without torchvision.

The library's own is made together with a processor of videos, which needs torchvision. This one has
its picture part, the library's for PIL, and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from piflow import storage
from piflow.backbones import text
from piflow.storage.foreign import shown
from piflow.storage.model_folder import LIBRARY_ERRORS, check_model_folder, reason

PROCESSOR, TOKENIZER = "processor", "tokenizer"  # subfolders of a pipeline's
_MARK = "<|image_pad|>"
_MOST_PIXELS = 2**24  # that a folder may have every picture enlarged to


class PictureProcessor(Qwen2VLProcessor):
    """Prompts with a picture each -> token ids, and the pictures' patches.

    Args:
        image_processor: cuts pictures into patches.
        tokenizer: the family's.
    """

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        # not the library's constructor, which looks for the class of a video part
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __call__(
        self,
        text: Sequence[str],
        images: Any,
        padding: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Token ids and mask `(B, L)`, patches of all pictures and their numbers in each.

        Args:
            text: prompts, each with one `<|image_pad|>`, which becomes as many as its picture has
                tokens.
            images: one PIL picture, or as many as prompts.

        Raises:
            ValueError: another number of pictures than of prompts, or of marks in a prompt.
        """
        pictures = list(images) if isinstance(images, list | tuple) else [images]
        counts = [prompt.count(_MARK) for prompt in text]
        if len(pictures) != len(text) or set(counts) != {1}:
            raise ValueError(
                f"expected prompts with one picture and one {_MARK} each, got {len(pictures)} "
                f"pictures for prompts with {counts}"
            )
        cut = self.image_processor(images=pictures, return_tensors=return_tensors)
        merged = self.image_processor.merge_size**2
        sizes = [int(grid.prod()) // merged for grid in cut["image_grid_thw"]]
        texts = [
            prompt.replace(_MARK, _MARK * size) for prompt, size in zip(text, sizes, strict=True)
        ]
        read = self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**read, **cut})

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> list[str]:  # type: ignore[override]
        """Writes both parts into one folder, as the library has them."""
        files = [
            *self.image_processor.save_pretrained(save_directory),
            *self.tokenizer.save_pretrained(save_directory),
        ]
        return [str(file) for file in files]


def load_processor(path: str, padding_side: str | None = "right") -> PictureProcessor:
    """The processor of a pipeline's folder.

    Args:
        path: URI of the pipeline's folder, with the subfolders `processor` and `tokenizer`.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: one is refused by `check_model_folder`, doesn't load, or asks for pictures of
            more pixels than are taken.
    """
    uri = storage.join(path, PROCESSOR)
    folder = storage.local_folder(uri)
    check_model_folder(str(folder), f"processor {uri}")
    try:
        pictures = Qwen2VLImageProcessorPil.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except LIBRARY_ERRORS as error:
        raise ValueError(f"cannot load the processor {uri}: {reason(error)}") from error
    least = pictures.size["shortest_edge"]
    if not isinstance(least, int) or not 0 < least <= _MOST_PIXELS:
        raise ValueError(
            f"the processor {uri} enlarges pictures to {shown(repr(least))} pixels, expected at "
            f"most {_MOST_PIXELS}; use the family's own processor"
        )
    place = storage.join(path, TOKENIZER)
    tokenizer = text.load_tokenizer(
        Qwen2Tokenizer, storage.local_folder(place), place, padding_side
    )
    return PictureProcessor(pictures, tokenizer)
