"""Qwen3 as a text encoder: chosen layers' states of a prompt that is the user's turn of a chat.

Several families take it, as their diffusers pipelines call it: FLUX.2-klein and Z-Image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piflow.backbones import text
from piflow.config import TextEncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

_MODEL, _TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True)
class Reading:
    """How a family reads Qwen3.

    Attributes:
        layers: whose states are taken, end to end: 0 are the embeddings, -1 what the model returns.
        thinking: the chat template's `enable_thinking`; without it the answer's empty thoughts
            stand at the end.
        keeps_padding: whether the states of all padding to `max_tokens` are kept, on the side that
            the tokenizer's files say; else only the prompt's own.
    """

    layers: tuple[int, ...]
    thinking: bool
    keeps_padding: bool

    @property
    def name(self) -> str:
        """For an encoder's identity."""
        return "+".join(map(str, self.layers))


def qwen3_identity(config: TextEncoderConfig, reading: Reading) -> EncoderIdentity:
    """The language model's size, and what is read of it.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or the model has too few layers.
    """
    parts = _parts(config)
    uri = parts.uris[_MODEL]
    tree = parts.config(_MODEL, "qwen3")
    layers, width = text.require_sizes(tree, ("num_hidden_layers", "hidden_size"), uri)
    needed = max(layer if layer >= 0 else -1 - layer for layer in reading.layers)
    if layers < needed:
        raise ValueError(
            f"the text encoder {uri} has {layers} layers, the family takes the states after layers "
            f"{', '.join(map(str, reading.layers))}; use the family's own"
        )
    return EncoderIdentity(
        name=f"qwen3-{layers}x{width}, layers {reading.name}",
        weights_sha256=parts.sha256(),
        max_tokens=config.max_tokens,
        hidden_size=len(reading.layers) * width,
    )


class Qwen3TextModel:
    """Token states of the chat template and the prompt.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model, or a tokenizer without a chat template.
    """

    def __init__(self, config: TextEncoderConfig, reading: Reading, device: str) -> None:
        from transformers import Qwen2Tokenizer, Qwen3Model

        self.identity = qwen3_identity(config, reading)
        parts = _parts(config)
        side = None if reading.keeps_padding else "right"
        self._tokenizer = parts.load_tokenizer(Qwen2Tokenizer, _TOKENIZER, padding_side=side)
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {parts.uris[_TOKENIZER]} has no chat template; copy the family's "
                "tokenizer_config.json or chat_template.jinja beside it"
            )
        self._model = parts.load_model(Qwen3Model, _MODEL, device)
        self._reading = reading
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of the template and the prompt together."""
        return text.count_tokens(self._tokenizer, self._turns(prompts))

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """Padding is masked inside the encoder."""
        inputs = self._tokenizer(
            self._turns(prompts),
            max_length=self.identity.max_tokens,
            padding="max_length" if self._reading.keeps_padding else True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        output = self._model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        states = [output.hidden_states[layer] for layer in self._reading.layers]
        counts = inputs.attention_mask.sum(1).tolist()
        if self._reading.keeps_padding:
            counts = [inputs.attention_mask.shape[1]] * len(prompts)
        rows = text.split_rows(torch.cat(states, dim=-1), counts)
        return [text.Embedding(row, None) for row in rows]

    def _turns(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt as the user's turn, up to where the answer begins."""
        conversations: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
        turns: list[str] = self._tokenizer.apply_chat_template(
            conversations,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self._reading.thinking,
        )
        return turns


def _parts(config: TextEncoderConfig) -> text.Parts:
    return text.Parts(config.path, (_MODEL,), (_TOKENIZER,))
