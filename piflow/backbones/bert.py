"""A BERT-like transformers encoder (BERT, MiniLM, MPNet, …)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from piflow import storage
from piflow.backbones import text
from piflow.config import BertEncoderConfig
from piflow.storage import fingerprint
from piflow.storage.fingerprint import EncoderIdentity
from piflow.storage.foreign import shown

MODEL_TYPES = (
    "albert",
    "bert",
    "camembert",
    "convbert",
    "deberta",
    "deberta-v2",
    "electra",
    "ernie",
    "layoutlm",
    "mobilebert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""The encoders that a config.json may choose: transformers has others that fetch what they need."""


def identity(config: BertEncoderConfig) -> EncoderIdentity:
    """The name is made of architecture and size ("bert-6x384"), never of the path.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it isn't a transformers folder with safetensors weights, or the encoder takes
            fewer than ``max_tokens`` tokens.
    """
    folder = storage.local_folder(config.path)
    tree = text.read_config(folder, config.path)
    if tree.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"config.json of encoder {config.path} has model_type "
            f"{shown(repr(tree.get('model_type')))}; encoder.type = bert takes "
            f"{', '.join(MODEL_TYPES)}"
        )
    if tree.get("max_position_embeddings") is not None:
        limit = text.number_of(tree, "max_position_embeddings", config.path)
        text.require_at_most(config.max_tokens, limit, f"the encoder {config.path}")
    keys = ("num_hidden_layers", "hidden_size")
    layers, hidden_size = text.require_sizes(tree, keys, config.path)
    return EncoderIdentity(
        name=f"{tree['model_type']}-{layers}x{hidden_size}",
        weights_sha256=fingerprint.files_sha256({config.path: folder}, {config.path: folder}),
        max_tokens=config.max_tokens,
        hidden_size=hidden_size,
    )


class BertModel:
    """Token states are the last hidden states of a prompt's valid tokens, special ones included.

    Pooled is their mean.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no usable encoder.
    """

    def __init__(self, config: BertEncoderConfig, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.identity = identity(config)
        folder = storage.local_folder(config.path)
        self._tokenizer = text.load_tokenizer(AutoTokenizer, folder, config.path)
        self._model = text.load_model(
            AutoModel, folder, config.path, device=device, dtype=torch.float32, unused=("pooler.",)
        )
        self._device = device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """With the special tokens."""
        return text.count_tokens(self._tokenizer, prompts)

    def forward(self, prompts: Sequence[str]) -> list[text.Embedding]:
        """Padding is masked."""
        inputs = self._tokenizer(
            list(prompts),
            truncation=True,
            max_length=self.identity.max_tokens,
            padding=True,
            return_tensors="pt",
        ).to(self._device)
        states = self._model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = ((states * mask).sum(1) / mask.sum(1)).cpu()
        tokens = text.split_rows(states, inputs["attention_mask"].sum(1).tolist())
        return [text.Embedding(*row) for row in zip(tokens, pooled.unbind(), strict=True)]


def load(config: BertEncoderConfig, device: str) -> BertModel:
    """The models of a recipe's section, on this device.

    Raises:
        FileNotFoundError, ValueError: as `BertModel`.
    """
    return BertModel(config, device)
