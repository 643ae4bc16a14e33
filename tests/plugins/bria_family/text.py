"""Bria's text encoder, as `BriaPipeline.encode_prompt` calls it."""

from collections.abc import Sequence

import torch

from bria_family import BriaEncoderConfig
from piflow.backbones import text
from piflow.storage.fingerprint import EncoderIdentity


def identity(config: BriaEncoderConfig) -> EncoderIdentity:
    parts = _parts(config)
    sizes = parts.config("text_encoder", "t5")
    uri = parts.uris["text_encoder"]
    layers, width = text.require_sizes(sizes, ("num_layers", "d_model"), uri)
    return EncoderIdentity(
        name=f"bria-t5-{layers}x{width}",
        weights_sha256=parts.sha256(),
        max_tokens=config.max_tokens,
        hidden_size=width,
    )


def load(config: BriaEncoderConfig, device: str) -> "BriaTextModel":
    return BriaTextModel(config, device)


def _parts(config: BriaEncoderConfig) -> text.Parts:
    return text.Parts(config.path, ["text_encoder"], ["tokenizer"])


class BriaTextModel:
    """The states of the prompt's own tokens, zeros for padding and for the empty prompt."""

    def __init__(self, config: BriaEncoderConfig, device: str) -> None:
        from transformers import T5EncoderModel, T5Tokenizer

        self.identity = identity(config)
        parts = _parts(config)
        self._model = parts.load_model(T5EncoderModel, "text_encoder", device)
        self._tokenizer = parts.load_tokenizer(T5Tokenizer, "tokenizer")
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return text.count_tokens(self._tokenizer, prompts)

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        inputs = text.pad(self._tokenizer, prompts, self.identity.max_tokens).to(self._device)
        states = self._model(inputs.input_ids, inputs.attention_mask).last_hidden_state
        rows = text.split_rows(states, inputs.attention_mask.sum(1).tolist())
        return [
            text.Embedding(row if prompt else torch.zeros_like(row), None)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
