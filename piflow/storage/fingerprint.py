"""What encoders and VAEs are, by the contents of their files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from piflow.storage.files import sha256
from piflow.storage.foreign import refuse_lfs_pointer, shown


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderIdentity(Record):
    """What decides an embedding, wherever the encoder's files lie.

    `name` holds architecture, sizes and what else changes the states; the hash covers weights,
    configurations and tokenizers.
    """

    name: str
    weights_sha256: str
    max_tokens: int
    hidden_size: int

    def __str__(self) -> str:
        return (
            f"{shown(self.name)} (weights {shown(self.weights_sha256[:12])}, "
            f"max_tokens {self.max_tokens}, "
            f"hidden_size {self.hidden_size})"
        )


class CodecIdentity(Record):
    """What decides a picture's latents, wherever the VAE's files lie."""

    name: str
    weights_sha256: str

    def __str__(self) -> str:
        return f"{shown(self.name)} (weights {shown(self.weights_sha256[:12])})"


_MODEL_FILES = ("config.json", "*.safetensors")

_TOKENIZER_FILES = (
    "tokenizer*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def files_sha256(models: Mapping[str, Path], tokenizers: Mapping[str, Path]) -> str:
    """Hex sha256 of the names and contents of all files that decide an encoder's result.

    Args:
        models: URI -> folder with config.json and safetensors weights, in a fixed order.
        tokenizers: URI -> folder with a tokenizer's files, in a fixed order.

    Raises:
        ValueError: a folder has no safetensors weights, or no tokenizer, or a file of them is a
            pointer of Git LFS.
    """
    digest = hashlib.sha256()
    for uri, folder in models.items():
        files = _matching(folder, _MODEL_FILES)
        if not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(
                f"folder {uri} holds no .safetensors weights (pickled weights are never "
                "read); convert them with `save_pretrained`"
            )
        _update(digest, files)
    for uri, folder in tokenizers.items():
        files = _matching(folder, _TOKENIZER_FILES)
        if not files:
            raise ValueError(
                f"encoder folder {uri} holds no tokenizer: expected tokenizer.json or the "
                "vocabulary files that its class reads"
            )
        _update(digest, files)
    return digest.hexdigest()


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _update(digest: Any, files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            refuse_lfs_pointer(stream.read(64), where=str(file))
        digest.update(f"{file.name}\0{sha256(str(file))}\n".encode())
