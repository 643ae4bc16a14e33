"""What one worker's memory has to hold: an estimate, from sizes alone.

frozen base         as stored, at the recipe's dtype
trained weights     float32, each with its gradient, its average and the optimiser's state
activations         what the student's backward pass needs of one micro-batch
fp8 teacher         one weight at a time, quantised: no second copy of the base

A replica holds all of it. Sharded workers (FSDP, ZeRO 3) hold a part of the first two, and whole
blocks for as long as they compute with them; what is offloaded lies in host memory instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from piflow.config import Recipe

SAFE_SHARE = 0.85  # of the free memory: the rest is for kernels' workspaces and fragmentation
GIB = 2**30

_WEIGHT = 4
_WEIGHT_GRADIENT_AVERAGE = _WEIGHT + 4 + 4  # bytes a trained parameter
_OPTIMIZER: Mapping[str, int] = {"adamw": 8, "adamw8bit": 2, "muon": 8}  # bytes, at most
# Bytes a token and channel of a block, arXiv 2205.05198, section 4.1: 34 at 16 bits without the
# attention's scores, which fused kernels don't keep. Twice that: float32 activations, or the
# float32 copies that LoRA branches keep of their inputs.
_BLOCK_ACTIVATIONS = 2 * 34
# Of which selective checkpointing keeps products and attention: queries, keys and values 3,
# attention and its projection 2, the MLP 4 + 1 values, in float32
_BLOCK_PRODUCTS = 4 * 10
_BLOCK_INPUT = 4  # all that is kept of a block which is computed again in the backward pass
_FP8_WORKSPACE = 1 + 4 + 4  # bytes a value of a weight: code, float32 copy, that over its scale
_BLOCKS_WHOLE = 2  # gathered at once: the one that computes, and the next
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
        largest: values of the largest weight that is not trained.
    """

    frozen_bytes: int
    trained: int
    blocks: int
    width: int
    largest: int = 0


@dataclass(frozen=True)
class ReplicaBytes:
    """Estimated bytes of a worker that keeps everything."""

    frozen: int
    trained: int  # with gradients, averages and the optimiser's state
    activations: int
    fp8: int = 0  # the teacher's weight that is being quantised

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations + self.fp8

    def __str__(self) -> str:
        fp8 = f", fp8 {self.fp8 / GIB:.2f}" if self.fp8 else ""
        return (
            f"{self.total / GIB:.2f} GiB (frozen base {self.frozen / GIB:.2f}, trained weights "
            f"with gradients, EMA and optimiser {self.trained / GIB:.2f}, activations "
            f"{self.activations / GIB:.2f}{fp8})"
        )


@dataclass(frozen=True)
class ShardBytes:
    """Estimated bytes of a worker that keeps a part of everything.

    Attributes:
        device: where it computes.
        host: what is offloaded from there.
    """

    device: int
    host: int

    def __str__(self) -> str:
        host = f" and {self.host / GIB:.2f} GiB of host memory" if self.host else ""
        return f"{self.device / GIB:.2f} GiB{host}"


def replica_bytes(recipe: Recipe, size: ModelSize) -> ReplicaBytes:
    """The estimate for a recipe and the size of its model."""
    training = recipe.training
    tokens = -(-tokens_of(recipe) // recipe.runtime.context_parallel)
    layer = training.micro_batch_size * tokens * size.width  # values
    kept = size.blocks * layer * _BLOCK_ACTIVATIONS
    if recipe.runtime.activation_checkpointing == "full":
        kept = size.blocks * layer * _BLOCK_INPUT + layer * _BLOCK_ACTIVATIONS
    elif recipe.runtime.activation_checkpointing == "selective":
        kept = size.blocks * layer * _BLOCK_PRODUCTS + layer * _BLOCK_ACTIVATIONS
    per_parameter = _WEIGHT_GRADIENT_AVERAGE + _OPTIMIZER[training.optimizer.type]
    fp8 = 0 if recipe.model.fp8_teacher is None else size.largest * _FP8_WORKSPACE
    return ReplicaBytes(size.frozen_bytes, size.trained * per_parameter, kept, fp8)


def shard_bytes(recipe: Recipe, size: ModelSize, world_size: int) -> ShardBytes:
    """The estimate for a worker under FSDP, or HSDP if the recipe says so."""
    whole = replica_bytes(recipe, size)
    parts = recipe.runtime.shard_size or world_size
    kept = -(-(whole.frozen + whole.trained) // parts)
    weights = whole.frozen + size.trained * _WEIGHT
    gathered = _BLOCKS_WHOLE * weights // max(size.blocks, 1)
    working = gathered + whole.activations + whole.fp8
    if recipe.runtime.offload == "cpu":
        return ShardBytes(device=working, host=kept)
    return ShardBytes(device=working + kept, host=0)


def tokens_of(recipe: Recipe) -> int:
    """Tokens of a sample: the largest picture's, of those that the recipe names, and the text's."""
    embed = recipe.embed
    sizes = [(embed.height, embed.width), *((bucket[0], bucket[1]) for bucket in embed.buckets)]
    side = _LATENT_PIXEL[recipe.model.codec] * _PATCH
    picture = max(-(-height // side) * -(-width // side) for height, width in sizes)
    return picture + recipe.encoder.text_tokens


def fits(needed: ReplicaBytes, free: int) -> bool:
    """Whether a replica fits a worker with `free` bytes, `SAFE_SHARE` of which are counted on."""
    return needed.total <= SAFE_SHARE * free
