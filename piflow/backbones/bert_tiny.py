"""A tiny random BERT."""

from __future__ import annotations

import string
from typing import Any

from piflow.backbones import tiny
from piflow.config import BertEncoderConfig


def text_parts(encoder: BertEncoderConfig) -> list[tuple[str, Any]]:
    """Model and tokenizer, both in the folder `encoder`."""
    tokenizer = _tokenizer()
    return [("encoder", _model(len(tokenizer), encoder.max_tokens)), ("encoder", tokenizer)]


def _tokenizer() -> Any:
    """A tokenizer whose tokens are letters."""
    from transformers import BertTokenizer

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    later = [f"##{letter}" for letter in string.ascii_lowercase]
    return BertTokenizer(vocab=tiny.numbered([*marks, *string.ascii_lowercase, *later]))


def _model(vocabulary: int, max_tokens: int) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=tiny.TEXT_WIDTH,
            intermediate_size=tiny.TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=max_tokens,
        )
    )
