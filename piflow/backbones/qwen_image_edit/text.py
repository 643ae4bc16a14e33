"""Qwen-Image-Edit's text encoder as `QwenImageEditPipeline.encode_prompt` calls it.

Qwen2.5-VL reads picture and prompt inside the family's template; the states of the template's first
64 tokens are dropped, those of the picture, the prompt and the template's end are kept. There is no
pooled vector.

Attention is causal and the picture stands before the prompt, so two prompts with one picture have
the same states up to the picture's end: of the negative prompt only the rest is given.

The pipeline, as it is installed, doesn't tell the model which tokens are a picture's, so their
positions are counted in a row like those of text. The same is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from piflow import storage
from piflow.backbones import text
from piflow.backbones.qwen_image_edit import QwenImageEditEncoderConfig
from piflow.storage import fingerprint
from piflow.storage.fingerprint import EncoderIdentity

if TYPE_CHECKING:
    from transformers import BatchEncoding, BatchFeature

MAX_TOKENS = 4096
SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
END = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED_TOKENS = 64  # of the template before the picture
_MODEL, _TOKENIZER, _PROCESSOR = "text_encoder", "tokenizer", "processor"
_PICTURE_END = "<|vision_end|>"


def identity(config: QwenImageEditEncoderConfig) -> EncoderIdentity:
    """The language model's size.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or `max_tokens` is over 4096.
    """
    text.require_at_most(config.max_tokens, MAX_TOKENS, "Qwen-Image-Edit")
    uris = {part: storage.join(config.path, part) for part in (_MODEL, _TOKENIZER, _PROCESSOR)}
    folders = {part: storage.local_folder(uri) for part, uri in uris.items()}
    tree = text.read_config(folders[_MODEL], uris[_MODEL])
    text.require_model_type(tree, "qwen2_5_vl", uris[_MODEL])
    language = text.part_of(tree, "text_config", uris[_MODEL]) or tree  # older: sizes at the top
    layers, hidden_size = text.require_sizes(
        language, ("num_hidden_layers", "hidden_size"), uris[_MODEL]
    )
    return EncoderIdentity(
        name=f"qwen2.5-vl-{layers}x{hidden_size}, edit",
        weights_sha256=fingerprint.files_sha256(
            {uris[_MODEL]: folders[_MODEL]},
            {uris[part]: folders[part] for part in (_TOKENIZER, _PROCESSOR)},
        ),
        max_tokens=config.max_tokens,
        hidden_size=hidden_size,
    )


class QwenImageEditTextModel:
    """Token states of the picture, the prompt and the template's end.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model, tokenizer or processor.
    """

    def __init__(self, config: QwenImageEditEncoderConfig, device: str) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        from piflow.backbones.qwen_image_edit.processor import load_processor

        self.identity = identity(config)
        self._processor = load_processor(config.path)
        self._tokenizer = self._processor.tokenizer
        if text.count_tokens(self._tokenizer, [SYSTEM])[0] < DROPPED_TOKENS:
            raise ValueError(
                f"the tokenizer of {config.path} makes fewer than {DROPPED_TOKENS} tokens of "
                "Qwen-Image-Edit's template; use the family's own tokenizer"
            )
        self._picture_end = self._tokenizer.convert_tokens_to_ids(_PICTURE_END)
        uri = storage.join(config.path, _MODEL)
        whole = text.load_model(
            Qwen2_5_VLForConditionalGeneration, storage.local_folder(uri), uri, device=device
        )
        self._model = whole.model  # the last hidden states, without logits over the vocabulary
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of the prompt and of the template's end."""
        return text.count_tokens(self._tokenizer, [prompt + END for prompt in prompts])

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """The prompts without pictures, in a template that has none."""
        inputs = self._tokenizer(
            [SYSTEM + prompt + END for prompt in prompts],
            max_length=self.identity.max_tokens + DROPPED_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        return [text.Embedding(states, None) for states in self._states(inputs)]

    def forward_with_pictures(
        self, prompts: Sequence[str], pictures: Sequence[Tensor], negative: str | None
    ) -> list[text.Embedding]:
        """Prompts with a picture each, ``(3, h, w)`` in [-1, 1]; padding is masked.

        What is beyond `max_tokens` is cut off the prompt: since attention is causal, that gives
        what the whole one gives there.

        Raises:
            ValueError: a picture that leaves no room for its prompt within `max_tokens`.
        """
        images = [_image(picture) for picture in pictures]
        read, ends = self._read(prompts, images)
        if negative is None:
            last: list[Tensor | None] = [None] * len(read)
        else:
            others, _ = self._read([negative] * len(read), images)
            last = [states[end:] for states, end in zip(others, ends, strict=True)]
        found = []
        for states, end, rest in zip(read, ends, last, strict=True):
            room = self.identity.max_tokens - (0 if rest is None else len(rest))
            if end >= room:
                raise ValueError(
                    f"a picture takes {end} tokens, which leaves none of encoder.max_tokens = "
                    f"{self.identity.max_tokens} for the prompt; raise encoder.max_tokens"
                )
            found.append(text.Embedding(states[:room], None, rest, end, len(states) > room))
        return found

    def _read(
        self, prompts: Sequence[str], images: list[Image.Image]
    ) -> tuple[list[Tensor], list[int]]:
        """The states of each prompt with its picture, and where the picture's end."""
        inputs = self._processor(
            text=[SYSTEM + PICTURE + prompt + END for prompt in prompts], images=images
        ).to(self._device)
        is_end = (inputs["input_ids"] == self._picture_end).int()
        ends = (is_end.argmax(1) + 1 - DROPPED_TOKENS).tolist()  # argmax: of the first one
        return self._states(inputs), ends

    def _states(self, inputs: BatchFeature | BatchEncoding) -> list[Tensor]:
        mask = inputs["attention_mask"]
        states = self._model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
            use_cache=False,
        ).last_hidden_state
        counts = (mask.sum(1) - DROPPED_TOKENS).tolist()
        return text.split_rows(states[:, DROPPED_TOKENS:], counts)


def _image(picture: Tensor) -> Image.Image:
    """A picture ``(3, h, w)`` in [-1, 1] by its levels, of which it was made."""
    levels = ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


def load(config: QwenImageEditEncoderConfig, device: str) -> QwenImageEditTextModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `QwenImageEditTextModel`.
    """
    return QwenImageEditTextModel(config, device)
