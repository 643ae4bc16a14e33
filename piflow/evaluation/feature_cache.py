"""Features of pictures that many evaluations are compared with, kept in this machine's cache.

A file a set of pictures and network, named by what decides it: where the pictures lie, their names
and the stamps of their files, and the network's identity. It is read as any file: a damaged one is
as good as none.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from piflow import storage
from piflow.storage.files import default_cache
from piflow.storage.foreign import ForeignDataError
from piflow.storage.tensor_file import read_header

MAX_BYTES = 2**32
_FEATURES, _IDENTITY = "features", "identity"


def cached_features(pictures: str, network: str) -> tuple[Tensor, str] | None:
    """The features ``(N, D)`` float64 and the pictures' identity; None: they aren't kept.

    Args:
        pictures: what names the set, and changes with its files.
        network: its identity.
    """
    place = str(_file(pictures, network))
    try:
        identity = read_header(place).metadata.get(_IDENTITY, "")
        features = load(storage.read_bytes(place, max_bytes=MAX_BYTES)).get(_FEATURES)
    except (OSError, ValueError, SafetensorError, ForeignDataError):
        return None
    if features is None or features.dim() != 2 or not identity:
        return None
    return features.double(), identity


def keep_features(pictures: str, network: str, features: Tensor, identity: str) -> None:
    """Keep features that were computed in float32; where nobody may write, they aren't kept."""
    content = save({_FEATURES: features.to(torch.float32)}, {_IDENTITY: identity})
    if len(content) <= MAX_BYTES:
        with suppress(OSError):
            storage.write_bytes(str(_file(pictures, network)), content)


def _file(pictures: str, network: str) -> Path:
    key = hashlib.sha256(f"{pictures}\0{network}".encode()).hexdigest()
    return default_cache() / "features" / f"{key[:32]}.safetensors"
