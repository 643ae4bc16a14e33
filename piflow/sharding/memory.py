"""What one worker's memory has to hold if it keeps a whole replica: an estimate, from sizes alone.

frozen base         as stored, at the recipe's dtype
trained weights     float32, each with its gradient, its average and the optimiser's state
activations         what the student's backward pass needs of one micro-batch
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from piflow.config import ClassLabelEncoderConfig, Recipe

SAFE_SHARE = 0.85  # of the free memory: the rest is for kernels' workspaces and fragmentation
GIB = 2**30

_WEIGHT_GRADIENT_AVERAGE = 4 + 4 + 4  # bytes a trained parameter
_OPTIMIZER: Mapping[str, int] = {"adamw": 8, "adamw8bit": 2, "muon": 8}  # bytes, at most
# Bytes a token and channel of a block, arXiv 2205.05198, section 4.1: 34 at 16 bits without the
# attention's scores, which fused kernels don't keep. Twice that: float32 activations, or the
# float32 copies that LoRA branches keep of their inputs.
_BLOCK_ACTIVATIONS = 2 * 34
_BLOCK_INPUT = 4  # all that is kept of a block which is computed again in the backward pass
_LATENT_PIXEL = {"pixels": 2, "vae": 8}  # side in picture pixels
_PATCH = 2  # side of a token in latent pixels


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know of a model.

    Attributes:
        frozen_bytes: of weights that are not trained.
        trained: number of trained parameters.
        blocks: transformer blocks.
        width: channels of a token in them.
    """

    frozen_bytes: int
    trained: int
    blocks: int
    width: int


@dataclass(frozen=True)
class ReplicaBytes:
    """Estimated bytes of a worker that keeps everything."""

    frozen: int
    trained: int  # with gradients, averages and the optimiser's state
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.2f} GiB (frozen base {self.frozen / GIB:.2f}, trained weights "
            f"with gradients, EMA and optimiser {self.trained / GIB:.2f}, activations "
            f"{self.activations / GIB:.2f})"
        )


def replica_bytes(recipe: Recipe, size: ModelSize) -> ReplicaBytes:
    """The estimate for a recipe and the size of its model."""
    training = recipe.training
    layer = training.micro_batch_size * tokens_of(recipe) * size.width  # values
    kept = size.blocks * layer * _BLOCK_ACTIVATIONS
    if training.gradient_checkpointing:
        kept = size.blocks * layer * _BLOCK_INPUT + layer * _BLOCK_ACTIVATIONS
    per_parameter = _WEIGHT_GRADIENT_AVERAGE + _OPTIMIZER[training.optimizer.type]
    return ReplicaBytes(size.frozen_bytes, size.trained * per_parameter, kept)


def tokens_of(recipe: Recipe) -> int:
    """Tokens of a sample: the largest picture's, of those that the recipe names, and the text's."""
    embed = recipe.embed
    sizes = [(embed.height, embed.width), *((bucket[0], bucket[1]) for bucket in embed.buckets)]
    side = _LATENT_PIXEL[recipe.model.codec] * _PATCH
    encoder = recipe.encoder
    text = 0 if isinstance(encoder, ClassLabelEncoderConfig) else encoder.max_tokens
    return max(-(-height // side) * -(-width // side) for height, width in sizes) + text


def fits(needed: ReplicaBytes, free: int) -> bool:
    """Whether a replica fits a worker with `free` bytes, `SAFE_SHARE` of which are counted on."""
    return needed.total <= SAFE_SHARE * free
