"""What a backbone is: one diffusers transformer behind a family-independent interface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from piflow.policies.base import to_device
from piflow.sharding.weights import StoredTensor

PATCH = 2  # side of the patch that a token is, where a family doesn't declare another
TOKEN_STEP = 32  # cut token states are multiples of it: few lengths, and sizes that kernels like


@dataclass(frozen=True)
class Conditioning:
    """A batch of embedded prompts.

    Attributes:
        tokens: `(B, L, D)` token states; positions from `num_tokens` on are zeros. L is the
            encoder's `max_tokens`, the same for every batch, so that a sample never depends on its
            neighbours (FLUX has no text mask); families that mask the text may get fewer (`cut`).
        num_tokens: `(B,)` valid tokens of each prompt.
        pooled: `(B, P)` pooled vector, or None for families without one. For class labels it is the
            class number, `(B, 1)` float32.
        full: every prompt is known to have L tokens, so that no mask is needed. To find that out
            from `num_tokens` would make the host wait for the device.
        condition: `(B, C, h, w)` latents of the pictures to be edited, of any size that the model
            takes; None: there are none, and the model makes pictures of prompts alone.
        negative: what classifier-free guidance turns away from, a prompt for each of these; None:
            one negative prompt serves all. It differs from prompt to prompt where the text encoder
            reads the picture to be edited as well.
    """

    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor | None = None
    full: bool = False
    condition: Tensor | None = None
    negative: Conditioning | None = None

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
        shown = self.condition
        if shown is not None and (shown.ndim != 4 or shown.shape[0] != batch):
            raise ValueError(
                f"condition must be ({batch}, C, h, w) to go with tokens "
                f"{tuple(self.tokens.shape)}, got {tuple(shown.shape)}"
            )
        if self.negative is not None and self.negative.batch_size != batch:
            raise ValueError(
                f"negative must hold {batch} prompts to go with tokens "
                f"{tuple(self.tokens.shape)}, got {self.negative.batch_size}"
            )

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Moves all to `device`; `dtype` applies to tokens and pooled only."""
        return Conditioning(
            to_device(self.tokens, device, dtype),
            to_device(self.num_tokens, device),
            None if self.pooled is None else to_device(self.pooled, device, dtype),
            self.full,
            None if self.condition is None else to_device(self.condition, device),
            None if self.negative is None else self.negative.to(device, dtype),
        )

    def editing(self, condition: Tensor | None) -> Conditioning:
        """The same prompts, each with its picture to be edited, `(B, C, h, w)`."""
        return replace(self, condition=condition)

    def cut(self, parts: int = 1) -> Conditioning:
        """Without the positions that no prompt fills, for a model that masks them.

        L becomes the longest prompt's length, rounded up to a multiple of `TOKEN_STEP`; where all
        prompts are equally long, just that length.

        Args:
            parts: L stays a multiple of it, as it was: workers that share a sample's tokens.
        """
        length = self.tokens.shape[1]
        counts = self.num_tokens.tolist()  # on the host: a batch is cut before it moves
        longest = max(counts, default=0)
        equal = longest > 0 and longest == min(counts) and longest % parts == 0
        step = math.lcm(TOKEN_STEP, parts)
        kept = longest if equal else min(length, step * max(1, math.ceil(longest / step)))
        full = bool(counts) and min(counts) == kept
        negative = None if self.negative is None else self.negative.cut(parts)
        return replace(self, tokens=self.tokens[:, :kept], full=full, negative=negative)

    def select(self, rows: Tensor) -> Conditioning:
        """The prompts of these indices, in their order; one may come several times."""
        rows = rows.to(self.tokens.device)
        return Conditioning(
            self.tokens[rows],
            self.num_tokens[rows],
            None if self.pooled is None else self.pooled[rows],
            self.full,
            None if self.condition is None else self.condition[rows],
            None if self.negative is None else self.negative.select(rows),
        )

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """This conditioning where `keep` `(B,)` is true, `other` (of size one or B) elsewhere.

        The pictures to be edited and the negative prompts stay this one's.

        Raises:
            ValueError: the two don't have the same widths, or only one has a pooled vector.
        """
        other = other.expand(self.batch_size).editing(self.condition)
        both = Conditioning.cat([self, other])  # checks that they fit, and pads the shorter one
        mine, others = both.tokens.chunk(2)
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.where(keep[:, None], self.pooled, other.pooled)
        return Conditioning(
            torch.where(keep[:, None, None], mine, others),
            torch.where(keep, self.num_tokens, other.num_tokens),
            pooled,
            both.full,
            self.condition,
            self.negative,
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
            self.full,
            None if self.condition is None else self.condition.expand(batch, -1, -1, -1),
            None if self.negative is None else self.negative.expand(batch),
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins along the batch; shorter parts are padded to the longest.

        Negative prompts are joined where all parts have their own, and left out otherwise.

        Raises:
            ValueError: nothing to join, token widths or pictures' shapes that differ, or only some
                parts have a pooled vector or a picture to be edited.
        """
        if not parts:
            raise ValueError("Conditioning.cat needs at least one part, got none")
        widths = {part.tokens.shape[2] for part in parts}
        if len(widths) > 1:
            raise ValueError(
                f"parts must share one width D of token states, got {sorted(widths)}: embed all "
                "prompts with one encoder"
            )
        lengths = [part.tokens.shape[1] for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled and len(pooled) < len(parts):
            raise ValueError(
                f"{len(pooled)} of {len(parts)} parts have a pooled vector: give all of them one"
            )
        shown = [part.condition for part in parts if part.condition is not None]
        shapes = {tuple(condition.shape[1:]) for condition in shown}
        if shown and (len(shown) < len(parts) or len(shapes) > 1):
            raise ValueError(
                f"{len(shown)} of {len(parts)} parts have pictures to be edited, with latents of "
                f"shapes {sorted(shapes)}: give all of them some of one shape"
            )
        longest = max(lengths)
        negatives = [part.negative for part in parts if part.negative is not None]
        return Conditioning(
            torch.cat(
                [F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in parts]
            ),
            torch.cat([part.num_tokens for part in parts]),
            torch.cat(pooled) if pooled else None,
            len(set(lengths)) == 1 and all(part.full for part in parts),
            torch.cat(shown) if shown else None,
            Conditioning.cat(negatives) if len(negatives) == len(parts) else None,
        )


def pack(latents: Tensor, patch: int = PATCH) -> Tensor:
    """`(B, C, H, W)` -> `(B, HW/p², p²C)`: p×p patches, row by row, channel-major inside.

    Raises:
        ValueError: H or W isn't a multiple of p.
    """
    batch, channels, height, width = latents.shape
    if height % patch or width % patch:
        wanted = "even" if patch == PATCH else f"multiples of {patch}"
        raise ValueError(f"latent height and width must be {wanted}, got {height}×{width}")
    rows, columns = height // patch, width // patch
    patches = latents.reshape(batch, channels, rows, patch, columns, patch)
    patches = patches.permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * patch * patch)


def unpack(tokens: Tensor, height: int, width: int, patch: int = PATCH) -> Tensor:
    """`(B, HW/p², p²F)` -> `(B, F, H, W)`, the inverse of `pack`."""
    batch, _, features = tokens.shape
    rows, columns, channels = height // patch, width // patch, features // (patch * patch)
    patches = tokens.reshape(batch, rows, columns, channels, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


class OutputLayer(nn.Module):
    """A transformer's own last layer: adaptive norm, then projection.

    Args:
        norm: `(B, T, d)`, `(B, d)` -> `(B, T, d)`, shifted and scaled by the time embedding.
        projection: d -> p²C, with or without a bias; rows are channel-major, (C, patch position).
        patch_size: p, side of the patch that a token is.
    """

    def __init__(self, norm: nn.Module, projection: nn.Linear, patch_size: int = PATCH) -> None:
        super().__init__()
        self.norm = norm
        self.projection = projection
        self.patch_size = patch_size

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, t)` -> `(B, T, p²C)`."""
        tokens: Tensor = self.projection(self.norm(hidden, temb))
        return tokens


class Backbone(Protocol):
    """One transformer: pack latents to tokens, call, unpack tokens to latents.

    Latents are `(B, C, H, W)`; a token holds a p×p patch, channel-major, whatever the family's own
    layout is. `copy.deepcopy` of a backbone gives an independent one.

    Attributes:
        module: the transformer, the thing that is sharded and checkpointed.
        dtype: the frozen base's dtype.
        width: the transformer's hidden size d.
        latent_channels: C.
        patch_size: p, 2 in nearly all families.
        latent_frames: frames of a video that latents hold, one below the other: H is so many times
            a frame's height. It may be set; a picture is one frame.
        class_name: the diffusers class in a model folder's config.json.
        block_classes: modules that are sharded one by one.
        output_names: submodules of `module` that make up its output layer; never adapted.
        adapter_class_names: `_class_name` in an adapter's config.json: of a GM student, of a DX
            student.
        adapter_fields: fields of `config` that an adapter's config.json repeats.
    """

    module: nn.Module
    dtype: torch.dtype
    width: int
    latent_channels: int
    patch_size: int
    latent_frames: int
    class_name: str
    block_classes: tuple[type[nn.Module], ...]
    output_names: tuple[str, ...]
    adapter_class_names: tuple[str, str]
    adapter_fields: tuple[str, ...]

    @classmethod
    def load(
        cls,
        uri: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        embedded_guidance: float | None = None,
    ) -> Self:
        """Loads a diffusers folder (config.json + safetensors) in evaluation mode."""
        ...

    @classmethod
    def load_empty(
        cls,
        uri: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        embedded_guidance: float | None = None,
    ) -> tuple[Self, dict[nn.Parameter, StoredTensor]]:
        """`load`, less the weights: `piflow.sharding.weights.fill` reads them once sharded."""
        ...

    @property
    def config(self) -> Mapping[str, object]:
        """The constructor's arguments, as in the family's config.json."""
        ...

    @property
    def default_lora_targets(self) -> tuple[str, ...]:
        """Name suffixes of the linear layers that the student adapts, each with a gradient."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """`(B, C, H, W)` float32 velocity, for an output layer that predicts one."""
        ...

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The same without gradients."""
        ...

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward pass at a latent size."""
        ...

    def editing_flops(
        self, height: int, width: int, text_tokens: int, condition_tokens: int
    ) -> int:
        """The same of a sample that edits a picture of so many tokens; for families that do."""
        ...

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at noise levels `(B,)` -> the output layer's `(B, HW/p², F)`."""
        ...

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """`(B, HW/p², p²F)` -> `(B, F, H, W)`."""
        ...

    def output_layer(self) -> OutputLayer:
        """The teacher's last adaptive norm and projection, whose tokens are the velocity's.

        A ValueError once replaced.
        """
        ...

    def require_stored_output(self) -> None:
        """A ValueError if the output layer isn't as the files have it, row by row."""
        ...

    def install_output(self, output: nn.Module) -> None:
        """Makes `output(hidden, temb)` the model's last layer."""
        ...

    def enable_gradient_checkpointing(self, *, selective: bool = False) -> None:
        """Recomputes each block in the backward pass; selective: but not its matrix products."""
        ...
