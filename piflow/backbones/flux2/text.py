"""FLUX.2's text encoder as diffusers' `Flux2Pipeline.encode_prompt` calls it: Mistral 3.

The model reads the prompt after the family's system message, in its tokenizer's chat template; a
token's state is those after layers 10, 20 and 30, end to end. The pipeline pads to `max_tokens` on
the side that its tokenizer says, and the transformer has no text mask and gives every token a
position, so all states are stored. There is no pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from piflow.backbones import text
from piflow.backbones.flux2 import Flux2EncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

LAYERS = (10, 20, 30)  # whose states are taken
_MODEL, _TOKENIZER = "text_encoder", "tokenizer"


def identity(config: Flux2EncoderConfig) -> EncoderIdentity:
    """The language model's size; its vision part isn't used.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or the model has too few layers.
    """
    parts = text.Parts(config.path, (_MODEL,), (_TOKENIZER,))
    uri = parts.uris[_MODEL]
    tree = parts.config(_MODEL, "mistral3")
    language, vision = (text.part_of(tree, key, uri) for key in ("text_config", "vision_config"))
    for part, expected in ((language, "mistral"), (vision, "pixtral")):
        if part.get("model_type", expected) != expected:  # transformers would build any other
            text.require_model_type(part, expected, uri)
    keys = ("num_hidden_layers", "hidden_size")
    layers, width = text.require_sizes(language, keys, uri)
    if layers < LAYERS[-1]:
        raise ValueError(
            f"the text encoder {uri} has {layers} layers, FLUX.2 takes the states "
            f"after layers {', '.join(map(str, LAYERS))}; use the family's own"
        )
    return EncoderIdentity(
        name=f"mistral3-{layers}x{width}, layers {'+'.join(map(str, LAYERS))}",
        weights_sha256=parts.sha256(),
        max_tokens=config.max_tokens,
        hidden_size=len(LAYERS) * width,
    )


class Flux2TextModel:
    """Token states of system message, prompt and padding.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model, or a tokenizer without a chat template.
    """

    def __init__(self, config: Flux2EncoderConfig, device: str) -> None:
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
        from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

        self.identity = identity(config)
        parts = text.Parts(config.path, (_MODEL,), (_TOKENIZER,))
        self._tokenizer = parts.load_tokenizer(AutoTokenizer, _TOKENIZER, padding_side=None)
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {parts.uris[_TOKENIZER]} has no chat template; copy the family's "
                "chat_template.jinja beside it"
            )
        whole = parts.load_model(Mistral3ForConditionalGeneration, _MODEL, device)
        self._model = whole.model  # hidden states, without logits over the vocabulary
        self._system_message = SYSTEM_MESSAGE
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of the system message and the prompt together."""
        return [len(ids) for ids in self._tokens(prompts, truncation=False)["input_ids"]]

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """Padding is masked inside the encoder, and its states are kept."""
        inputs = self._tokens(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.identity.max_tokens,
            return_tensors="pt",
        ).to(self._device)
        output = self._model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1)
        rows = text.split_rows(states, [states.shape[1]] * len(prompts))
        return [text.Embedding(row, None) for row in rows]

    def _tokens(self, prompts: Sequence[str], **options: Any) -> Any:
        """The tokenizer's result for each prompt's conversation."""

        def said(role: str, text: str) -> dict[str, Any]:
            return {"role": role, "content": [{"type": "text", "text": text}]}

        # [IMG] is the mark of a picture, of which there are none
        conversations = [
            [said("system", self._system_message), said("user", prompt.replace("[IMG]", ""))]
            for prompt in prompts
        ]
        return self._tokenizer.apply_chat_template(
            conversations, add_generation_prompt=False, tokenize=True, return_dict=True, **options
        )


def load(config: Flux2EncoderConfig, device: str) -> Flux2TextModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `Flux2TextModel`.
    """
    return Flux2TextModel(config, device)
