"""What a backbone is: one diffusers transformer behind a family-independent interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """A batch of text embeddings.

    Attributes:
        tokens: `(B, L, D)` token states; positions from `num_tokens` on are zeros. L is the
            encoder's `max_tokens`, the same for every batch, so that a sample never depends on its
            neighbours (FLUX has no text mask).
        num_tokens: `(B,)` valid tokens of each prompt.
        pooled: `(B, P)` pooled vector, or None for families without one.
    """

    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(
                f"tokens must be (B, L, D), got shape {tuple(self.tokens.shape)}: "
                "stack the prompts' token states, padded with zeros to the encoder's max_tokens"
            )
        batch = self.tokens.shape[0]
        if self.num_tokens.shape != (batch,):
            raise ValueError(
                f"num_tokens must be ({batch},) to go with tokens {tuple(self.tokens.shape)}, "
                f"got {tuple(self.num_tokens.shape)}"
            )
        if self.pooled is not None and (self.pooled.ndim != 2 or self.pooled.shape[0] != batch):
            raise ValueError(
                f"pooled must be ({batch}, P) to go with tokens {tuple(self.tokens.shape)}, "
                f"got {tuple(self.pooled.shape)}"
            )

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Conditioning:
        """Moves all three to `device`; `dtype` applies to tokens and pooled only."""
        return Conditioning(
            self.tokens.to(device=device, dtype=dtype),
            self.num_tokens.to(device=device),
            None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
        )

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """This conditioning where `keep` `(B,)` is true, `other` (of size one or B) elsewhere.

        Raises:
            ValueError: the two don't have the same widths, or only one has a pooled vector.
        """
        other = other.expand(self.batch_size)
        Conditioning.cat([self, other])  # checks that they fit
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.where(keep[:, None], self.pooled, other.pooled)
        return Conditioning(
            torch.where(keep[:, None, None], self.tokens, other.tokens),
            torch.where(keep, self.num_tokens, other.num_tokens),
            pooled,
        )

    def slice(self, start: int, stop: int) -> Conditioning:
        """Samples `start` to `stop` (exclusive)."""
        return Conditioning(
            self.tokens[start:stop],
            self.num_tokens[start:stop],
            None if self.pooled is None else self.pooled[start:stop],
        )

    def expand(self, batch: int) -> Conditioning:
        """A batch of one, shown `batch` times without a copy (the empty prompt of CFG).

        Raises:
            ValueError: this conditioning is neither of size one nor of size `batch`.
        """
        if self.batch_size == batch:
            return self
        if self.batch_size != 1:
            raise ValueError(
                f"can't expand a conditioning of {self.batch_size} samples to {batch}: "
                f"pass one sample or {batch}"
            )
        return Conditioning(
            self.tokens.expand(batch, -1, -1),
            self.num_tokens.expand(batch),
            None if self.pooled is None else self.pooled.expand(batch, -1),
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins along the batch.

        Raises:
            ValueError: nothing to join, token lengths or widths that differ, or only some parts
                have a pooled vector.
        """
        if not parts:
            raise ValueError("Conditioning.cat needs at least one part, got none")
        shapes = {tuple(part.tokens.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"parts must share one (L, D), got {sorted(shapes)}: "
                "pad all prompts to the same max_tokens"
            )
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled and len(pooled) < len(parts):
            raise ValueError(
                f"{len(pooled)} of {len(parts)} parts have a pooled vector: give all of them one"
            )
        return Conditioning(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.num_tokens for part in parts]),
            torch.cat(pooled) if pooled else None,
        )


class Backbone(Protocol):
    """One transformer: pack latents to tokens, call, unpack tokens to latents.

    Latents are `(B, C, H, W)`; a token holds a 2×2 patch, channel-major.

    Attributes:
        module: the diffusers transformer, the thing that is sharded and checkpointed.
        dtype: the frozen base's dtype.
        width: the transformer's hidden size d.
        latent_channels: C.
        block_classes: modules that are sharded one by one.
        default_lora_targets: module name suffixes that the student adapts.
    """

    module: nn.Module
    dtype: torch.dtype
    width: int
    latent_channels: int
    block_classes: tuple[type[nn.Module], ...]
    default_lora_targets: tuple[str, ...]

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments, as in the family's config.json."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """`(B, C, H, W)` float32 velocity, for an output layer that predicts one."""
        ...

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The same without gradients."""
        ...

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at noise levels `(B,)` -> the output layer's `(B, HW/4, F)`."""
        ...

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """`(B, HW/4, 4F)` -> `(B, F, H, W)`."""
        ...

    def output_layers(self) -> tuple[nn.Module, nn.Linear]:
        """The teacher's last adaptive norm and projection."""
        ...

    def install_output(self, output: nn.Module) -> None:
        """Replaces norm and projection by `output(hidden, temb)`."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        ...
