"""What data hands to training: prompts with their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from piflow.backbones.base import Conditioning


class Embedded(Protocol):
    """Prompts with their embeddings, as the store and the stream hand them out."""

    @property
    def tokens(self) -> Tensor:
        """(m, L, D) float32, zeros beyond `num_tokens`."""
        ...

    @property
    def num_tokens(self) -> Tensor:
        """(m,)."""
        ...

    @property
    def pooled(self) -> Tensor | None:
        """(m, P)."""
        ...


class MicroBatch(Embedded, Protocol):
    """What one forward pass trains on: prompts of one picture size."""

    @property
    def index(self) -> int:
        """Place in the global batch, in micro-batches."""
        ...

    @property
    def prompt_ids(self) -> Sequence[str]: ...

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def latents(self) -> Tensor | None:
        """Of the prompts' pictures, (m, C, h, w) float32; None if they weren't asked for."""
        ...


def conditioning(batch: Embedded, device: torch.device) -> Conditioning:
    """The prompts' text conditioning on the device."""
    return Conditioning(batch.tokens, batch.num_tokens, batch.pooled).to(device)
