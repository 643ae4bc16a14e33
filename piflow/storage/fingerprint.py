"""What encoders and VAEs are, by the contents of their files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from piflow.storage.files import explained, filesystem, list_files, sha256
from piflow.storage.foreign import refuse_lfs_pointer, shown
from piflow.storage.tensor_file import TensorRange, read_header
from piflow.storage.uri import member, scheme


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


_SAMPLE_BYTES = 1024  # of a tensor's values, at its start, middle and end

_READERS = 16  # ranges that are read at once: an object store answers each after milliseconds


def weights_fingerprint(folder: str) -> str | None:
    """What tells one model's weights from another's without reading them whole.

    Hex sha256 of every tensor's name, dtype, shape and 3 KiB of its values, so that a copy has it
    too, in whatever files and on whatever storage. It finds weights that were trained on or
    replaced; not, as a hash of all bytes would, a few values that were changed on purpose.

    Args:
        folder: URI of a folder with safetensors files; not of a hub, whose files are read whole.

    Returns:
        None: the folder lies on a hub, where a revision names its content, or has no weights.

    Raises:
        ValueError: a file that isn't safetensors.
        OSError: a file can't be read.
    """
    if scheme(folder) == "hf":
        return None
    parts: dict[str, bytes] = {}
    for name in list_files(folder, recursive=False):
        if name.endswith(".safetensors"):
            parts |= _tensor_samples(member(folder, name))
    digest = hashlib.sha256()
    for tensor in sorted(parts):
        digest.update(parts[tensor])
    return digest.hexdigest() if parts else None


def _tensor_samples(uri: str) -> dict[str, bytes]:
    """Name -> what is hashed of each tensor of a file."""
    tensors = read_header(uri).tensors
    system, path = filesystem(uri)
    with (
        explained(uri),
        system.open_input_file(path) as file,
        ThreadPoolExecutor(_READERS) as readers,
    ):

        def sample(item: tuple[str, TensorRange]) -> tuple[str, bytes]:
            name, tensor = item
            size = min(_SAMPLE_BYTES, tensor.end - tensor.start)
            middle = (tensor.start + tensor.end - size) // 2
            places = dict.fromkeys((tensor.start, middle, tensor.end - size))
            values = b"".join(file.read_at(size, place) for place in places)
            return name, f"{name}\0{tensor.code}{list(tensor.shape)}\0".encode() + values

        return dict(readers.map(sample, tensors.items()))


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
