"""Wan's text encoder as diffusers' `WanPipeline.encode_prompt` calls it: UMT5.

Only the states of a prompt's own tokens are stored; the model sees zeros up to `max_tokens`, as the
pipeline makes them. Prompts are cleaned by the pipeline's own function: entities of HTML are read,
white space is one blank, and where the package ftfy is installed it repairs broken text.
"""

from __future__ import annotations

from collections.abc import Sequence

from piflow.backbones import text
from piflow.backbones.wan import WanEncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

MAX_TOKENS = 512  # the model was trained with
_MODEL, _TOKENIZER = "text_encoder", "tokenizer"


def identity(config: WanEncoderConfig) -> EncoderIdentity:
    """The encoder's size.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or `max_tokens` is over 512.
    """
    text.require_at_most(config.max_tokens, MAX_TOKENS, "Wan")
    parts = _parts(config)
    umt5 = parts.config(_MODEL, "umt5")
    layers, width = text.require_sizes(umt5, ("num_layers", "d_model"), parts.uris[_MODEL])
    return EncoderIdentity(
        name=f"umt5-{layers}x{width}",
        weights_sha256=parts.sha256(),
        max_tokens=config.max_tokens,
        hidden_size=width,
    )


def _parts(config: WanEncoderConfig) -> text.Parts:
    return text.Parts(config.path, (_MODEL,), (_TOKENIZER,))


class WanTextModel:
    """UMT5's last hidden states.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model or tokenizer.
    """

    def __init__(self, config: WanEncoderConfig, device: str) -> None:
        from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]
        from transformers import UMT5EncoderModel

        self.identity = identity(config)
        parts = _parts(config)
        self._model = parts.load_model(UMT5EncoderModel, _MODEL, device)
        self._tokenizer = parts.load_tokenizer(T5Tokenizer, _TOKENIZER)
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """With the end mark."""
        return text.count_tokens(self._tokenizer, _cleaned(prompts))

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """Padding is masked."""
        inputs = self._tokenizer(
            _cleaned(prompts),
            max_length=self.identity.max_tokens,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        states = self._model(inputs.input_ids, inputs.attention_mask).last_hidden_state
        counts = inputs.attention_mask.sum(1).tolist()
        return [text.Embedding(row, None) for row in text.split_rows(states, counts)]


def _cleaned(prompts: Sequence[str]) -> list[str]:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return [prompt_clean(prompt) for prompt in prompts]


def load(config: WanEncoderConfig, device: str) -> WanTextModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `WanTextModel`.
    """
    return WanTextModel(config, device)
