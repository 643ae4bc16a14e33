"""What a forward pass computes, in closed form from a family's config.

Counted are the products of matrices, at two operations a multiply-add, for one sample: nearly all
of the time goes there, and utilisation figures (MFU) are by convention in these. Norms, activations
and positions are left out, and so is LoRA.

T picture tokens, L text tokens, N = T + L in attention, width d. A layer of w weights costs 2 w T
on the picture's stream, 2 w once where it sees the time embedding alone; attention costs 4 N² d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piflow.backbones.base import Backbone, Conditioning

TIME_FEATURES = 256  # sinusoids of the time, in all families but FLUX.2, whose config says


def hidden_size(config: Mapping[str, Any]) -> int:
    """d."""
    size: int = config["num_attention_heads"] * config["attention_head_dim"]
    return size


def attention(d: int, tokens: int) -> int:
    """Operations of scores and of their sum of values."""
    return 4 * tokens * tokens * d


def mlp(features: int, d: int) -> int:
    """Weights of an embedder's two layers."""
    return features * d + d * d


def ends(config: Mapping[str, Any], d: int, picture: int, text: int) -> int:
    """Weights times tokens: packed tokens in and out, text in, the output's modulation."""
    patches = 2 * config["in_channels"] * d * picture
    joint: int = config["joint_attention_dim"]
    return patches + joint * d * text + 2 * d * d


def patch_ends(config: Mapping[str, Any], d: int, picture: int) -> int:
    """The same of models that cut patches themselves, without text."""
    patch: int = config["patch_size"] ** 2 * config["in_channels"]
    return 2 * patch * d * picture + 2 * d * d


def sample_flops(backbone: Backbone, height: int, width: int, cond: Conditioning) -> int:
    """Operations of one sample of a conditioning, the picture that it edits included.

    Args:
        height, width: of the latents.
    """
    text_tokens = cond.tokens.shape[1]
    if cond.condition is None:
        return backbone.flops(height, width, text_tokens)
    pixels = cond.condition.shape[2] * cond.condition.shape[3]
    shown = pixels // backbone.patch_size**2
    return backbone.editing_flops(height, width, text_tokens, shown)
