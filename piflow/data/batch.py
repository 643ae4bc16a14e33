"""What data hands to training: prompts with their embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from piflow.backbones.base import Conditioning
from piflow.config import Recipe, find_family
from piflow.data.rows import EmbeddingBatch, TokenStates
from piflow.policies.base import to_device
from piflow.sharding.side_stream import Mark, SideStream


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


def condition_of(batch: Embedded) -> Tensor | None:
    """Latents of the pictures to be edited, (m, C, h, w); None: there are none.

    Raises:
        ValueError: they have several shapes, and make no batch.
    """
    if isinstance(batch, MicroBatch):
        return batch.condition
    conditions = batch.conditions if isinstance(batch, EmbeddingBatch) else None
    if conditions is None:
        return None
    shapes = sorted({tuple(condition.shape) for condition in conditions})
    if len(shapes) > 1:
        raise ValueError(
            f"pictures to be edited have latents of shapes {shapes}: take those of one shape at a "
            "time"
        )
    return torch.stack(conditions)


def _negative_of(batch: Embedded) -> Conditioning | None:
    """The rows' own negative prompts; None: one serves all."""
    states = batch.negative if isinstance(batch, MicroBatch | EmbeddingBatch) else None
    return None if states is None else Conditioning(*states)


def by_condition(batch: EmbeddingBatch) -> list[tuple[list[int], EmbeddingBatch]]:
    """Places in the batch, and its rows there; together where pictures to edit have one shape.

    All rows where there are no such pictures; else by the shapes' first appearance.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(batch.prompts)):
        shape = () if batch.conditions is None else tuple(batch.conditions[row].shape)
        places.setdefault(shape, []).append(row)
    return [(rows, batch.select(rows)) for rows in places.values()]


def conditioning(
    batch: Embedded, device: torch.device, *, shared_by: int | None = None
) -> Conditioning:
    """The prompts' text conditioning on the device; that of `on_device`, if it is this one.

    Args:
        shared_by: as `cut_for` says; without it, padding stays.
    """
    there = batch.there if isinstance(batch, MicroBatch) else None
    if there is not None and (there.device, there.shared_by) == (device, shared_by):
        return there.take().cond
    cond = Conditioning(
        batch.tokens,
        batch.num_tokens,
        batch.pooled,
        condition=condition_of(batch),
        negative=_negative_of(batch),
    )
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
    the stream wasn't asked for them; ``condition`` are those of pictures to be edited, which may
    have another size. ``negative`` are negative prompts of the rows' own. ``there`` is what of it
    is on a device already.
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
    condition: Tensor | None = None
    negative: TokenStates | None = None
    there: OnDevice | None = None


@dataclass(frozen=True)
class OnDevice:
    """A micro-batch's tensors, on their way to a device or there.

    Attributes:
        shared_by: what the conditioning was cut for.
        mark: behind the copies, in the stream that makes them.
    """

    cond: Conditioning
    latents: Tensor | None
    device: torch.device
    shared_by: int | None
    mark: Mark

    def take(self) -> OnDevice:
        """Itself; what the current stream is given from now on comes after the copies."""
        cond = self.cond
        tensors = [cond.tokens, cond.num_tokens, cond.pooled, cond.condition, self.latents]
        if cond.negative is not None:
            tensors += [cond.negative.tokens, cond.negative.num_tokens]
        self.mark.wait_here(tensor for tensor in tensors if tensor is not None)
        return self


@dataclass(frozen=True)
class StreamBatch:
    """One rank's part of an optimiser step; `replaced` counts rows by damaged row group."""

    step: int
    micro_batches: list[MicroBatch]
    replaced: dict[str, int]


def on_device(batch: StreamBatch, stream: SideStream, shared_by: int | None) -> StreamBatch:
    """The batch, its tensors on their way to the stream's device.

    Called beside the step before: the copies don't wait for its kernels, nor its kernels for them.

    Args:
        shared_by: as for `conditioning`.
    """
    micro_batches = []
    for batch_of_a_pass in batch.micro_batches:
        latents = batch_of_a_pass.latents
        with stream.queue():
            cond = conditioning(batch_of_a_pass, stream.device, shared_by=shared_by)
            if latents is not None:
                latents = to_device(latents, stream.device)
        there = OnDevice(cond, latents, stream.device, shared_by, stream.mark())
        micro_batches.append(replace(batch_of_a_pass, there=there))
    return replace(batch, micro_batches=micro_batches)
