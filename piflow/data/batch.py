"""What data hands to training: prompts with their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from piflow.backbones.base import Conditioning
from piflow.config import Recipe, find_family

if TYPE_CHECKING:
    from torch import Tensor


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


def conditioning(
    batch: Embedded, device: torch.device, *, shared_by: int | None = None
) -> Conditioning:
    """The prompts' text conditioning on the device.

    Args:
        shared_by: as `cut_for` says; without it, padding stays.
    """
    cond = Conditioning(batch.tokens, batch.num_tokens, batch.pooled)
    return (cond if shared_by is None else cond.cut(shared_by)).to(device)


def cut_for(recipe: Recipe) -> int | None:
    """Workers that share what a batch is cut to; None: the model reads padding, which must stay."""
    masked = find_family(recipe.model.family).masks_text
    return recipe.runtime.context_parallel if masked else None


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: tokens ``(m, L, D)`` float32, zeros beyond ``num_tokens`` ``(m,)``.

    ``index`` counts within the step, over all ranks; pooled is ``(m, P)``, or None for encoders
    without one; sizes are pixels. Latents of the pictures are ``(m, C, h, w)`` float32, or None if
    the stream wasn't asked for them.
    """

    index: int
    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor | None
    height: int
    width: int
    latents: Tensor | None = None


@dataclass(frozen=True)
class StreamBatch:
    """One rank's part of an optimiser step; `replaced` counts rows by damaged row group."""

    step: int
    micro_batches: list[MicroBatch]
    replaced: dict[str, int]
