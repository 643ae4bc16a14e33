"""Text encoders: prompts -> token states and a pooled vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from piflow import storage
from piflow.data.store import EncodedPrompt, EncoderIdentity


def encoder_identity(path_uri: str, max_tokens: int) -> EncoderIdentity:
    """What an encoder's folder holds, without loading it.

    The name is made of architecture and size ("bert-6x384"), never of the path; the hash covers
    the name and content of all ``.safetensors`` files.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it isn't a transformers folder with safetensors weights, or the encoder takes
            fewer than ``max_tokens`` tokens.
    """
    folder = storage.local_folder(path_uri)
    config = _read_config(folder, path_uri)
    limit = config.get("max_position_embeddings")
    if limit is not None and max_tokens > limit:
        raise ValueError(
            f"encoder.max_tokens is {max_tokens}, the encoder {path_uri} takes at most {limit}; "
            "lower encoder.max_tokens"
        )
    layers, hidden_size = config.get("num_hidden_layers"), config.get("hidden_size")
    if layers is None or hidden_size is None:
        raise ValueError(
            f"config.json of encoder {path_uri} lacks num_hidden_layers or hidden_size: not an "
            "encoder of type 'bert'"
        )
    return EncoderIdentity(
        name=f"{config.get('model_type', 'encoder')}-{layers}x{hidden_size}",
        weights_sha256=_weights_sha256(folder, path_uri),
        max_tokens=max_tokens,
        hidden_size=hidden_size,
    )


class BertEncoder:
    """A BERT-like transformers encoder (BERT, MiniLM, MPNet, …).

    Token states are the last hidden states of a prompt's valid tokens (with the special ones);
    pooled is their mean. A prompt over ``max_tokens`` is truncated and marked so. A prompt's
    result depends on the others in its batch by rounding only: padding is masked.

    Args:
        path_uri: URI of a transformers folder: config, tokenizer, safetensors weights.
        max_tokens: longest prompt in tokens, special tokens included.
        device: where the encoder runs; results come back to the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no usable encoder.
    """

    def __init__(self, path_uri: str, max_tokens: int, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.identity = encoder_identity(path_uri, max_tokens)
        folder = storage.local_folder(path_uri)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"cannot load the text encoder {path_uri}: {error}") from error
        self._tokenizer.padding_side = "right"  # valid tokens come first in a row
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device
        self._max_tokens = max_tokens

    def encode(
        self,
        prompts: Sequence[str],
        batch_size: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[EncodedPrompt]:
        """Encode prompts; results in the prompts' order.

        Args:
            prompts: any number of texts; "" is allowed.
            batch_size: prompts an encoder call; those of similar length go together.
            on_batch: called with the number of prompts after each encoder call.
        """
        encoded: dict[int, EncodedPrompt] = {}
        for rows, results in self.encode_by_length(prompts, batch_size):
            encoded.update(zip(rows, results, strict=True))
            if on_batch is not None:
                on_batch(len(rows))
        return [encoded[row] for row in range(len(prompts))]

    def encode_by_length(
        self, prompts: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[int], list[EncodedPrompt]]]:
        """Encoder calls one by one, short prompts first: (indices of prompts, their results)."""
        lengths = self.count_tokens(prompts)
        order = sorted(range(len(prompts)), key=lambda row: (lengths[row], row))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            cut = [lengths[row] > self._max_tokens for row in rows]
            yield rows, self._forward([prompts[row] for row in rows], cut)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, special tokens included."""
        if not prompts:
            return []
        ids = self._tokenizer(list(prompts), truncation=False, padding=False, verbose=False)
        return [len(row) for row in ids["input_ids"]]

    @torch.inference_mode()
    def _forward(self, prompts: list[str], cut: list[bool]) -> list[EncodedPrompt]:
        inputs = self._tokenizer(
            prompts, truncation=True, max_length=self._max_tokens, padding=True, return_tensors="pt"
        ).to(self._device)
        states = self._model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = ((states * mask).sum(1) / mask.sum(1)).cpu()
        counts = inputs["attention_mask"].sum(1).tolist()
        states = states.cpu()
        return [
            EncodedPrompt(states[row, :count].clone(), pooled[row].clone(), cut[row])
            for row, count in enumerate(counts)
        ]


def _read_config(folder: Path, path_uri: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"encoder folder {path_uri} has no config.json; expected a transformers folder with "
            "config, tokenizer and safetensors weights"
        ) from error
    except ValueError as error:
        raise ValueError(f"config.json of encoder {path_uri} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config.json of encoder {path_uri} must hold an object")
    return config


def _weights_sha256(folder: Path, path_uri: str) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"encoder folder {path_uri} holds no .safetensors weights (pickled weights are never "
            "read); convert them with `save_pretrained(safe_serialization=True)`"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{storage.sha256(str(file))}\n".encode())
    return digest.hexdigest()
