"""Qwen-Image's text encoder as diffusers' `QwenImagePipeline.encode_prompt` calls it.

Qwen2.5-VL reads the prompt inside the family's template; the states of the template's first 34
tokens are dropped, those of its end are kept. There is no pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from piflow import storage
from piflow.backbones import text
from piflow.backbones.qwen_image import QwenImageEncoderConfig
from piflow.storage import fingerprint
from piflow.storage.fingerprint import EncoderIdentity

MAX_TOKENS = 1024  # QwenImagePipeline takes no longer prompts
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED_TOKENS = 34  # of the template before the prompt
_MODEL, _TOKENIZER = "text_encoder", "tokenizer"


def identity(config: QwenImageEncoderConfig) -> EncoderIdentity:
    """The language model's size; its vision part isn't used.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds something else, or `max_tokens` is over 1024.
    """
    text.require_at_most(config.max_tokens, MAX_TOKENS, "Qwen-Image")
    model_uri = storage.join(config.path, _MODEL)
    tokenizer_uri = storage.join(config.path, _TOKENIZER)
    folder = storage.local_folder(model_uri)
    tree = text.read_config(folder, model_uri)
    text.require_model_type(tree, "qwen2_5_vl", model_uri)
    language = text.part_of(tree, "text_config", model_uri) or tree  # older: the sizes at the top
    keys = ("num_hidden_layers", "hidden_size")
    layers, hidden_size = text.require_sizes(language, keys, model_uri)
    return EncoderIdentity(
        name=f"qwen2.5-vl-{layers}x{hidden_size}",
        weights_sha256=fingerprint.files_sha256(
            {model_uri: folder}, {tokenizer_uri: storage.local_folder(tokenizer_uri)}
        ),
        max_tokens=config.max_tokens,
        hidden_size=hidden_size,
    )


class QwenImageTextModel:
    """Token states of the prompt and the template's end.

    Attention is causal, so truncation to `max_tokens` before the call gives what the pipeline
    gives by cutting afterwards.

    Raises:
        FileNotFoundError: a subfolder is missing.
        ValueError: a subfolder holds no usable model or tokenizer.
    """

    def __init__(self, config: QwenImageEncoderConfig, device: str) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        self.identity = identity(config)
        model_uri = storage.join(config.path, _MODEL)
        tokenizer_uri = storage.join(config.path, _TOKENIZER)
        tokenizer_folder = storage.local_folder(tokenizer_uri)
        self._tokenizer = text.load_tokenizer(Qwen2Tokenizer, tokenizer_folder, tokenizer_uri)
        if self.count_tokens([""])[0] <= 0:
            raise ValueError(
                f"the tokenizer {tokenizer_uri} makes no more than {DROPPED_TOKENS} tokens of "
                "Qwen-Image's template; use the family's own tokenizer"
            )
        whole = text.load_model(
            Qwen2_5_VLForConditionalGeneration,
            storage.local_folder(model_uri),
            model_uri,
            device=device,
        )
        self._model = whole.model  # the last hidden states, without logits over the vocabulary
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of the prompt and of the template's end."""
        counts = text.count_tokens(self._tokenizer, [TEMPLATE.format(text) for text in prompts])
        return [count - DROPPED_TOKENS for count in counts]

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """Padding is masked."""
        inputs = self._tokenizer(
            [TEMPLATE.format(text) for text in prompts],
            max_length=self.identity.max_tokens + DROPPED_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        states = self._model(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False
        ).last_hidden_state
        counts = (inputs.attention_mask.sum(1) - DROPPED_TOKENS).tolist()
        tokens = text.split_rows(states[:, DROPPED_TOKENS:], counts)
        return [text.Embedding(row, None) for row in tokens]


def load(config: QwenImageEncoderConfig, device: str) -> QwenImageTextModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `QwenImageTextModel`.
    """
    return QwenImageTextModel(config, device)
