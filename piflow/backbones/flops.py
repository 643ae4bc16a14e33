"""What a forward pass computes, in closed form from a family's config.

Counted are the products of matrices, at two operations a multiply-add, for one sample: nearly all
of the time goes there, and utilisation figures (MFU) are by convention in these. Norms, activations
and positions are left out, and so is LoRA.

T picture tokens, L text tokens, N = T + L in attention, width d. A layer of w weights costs 2 w T
on the picture's stream, 2 w once where it sees the time embedding alone; attention costs 4 N² d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIME_FEATURES = 256  # sinusoids of the time, in all families but FLUX.2, whose config says


def flux(config: Mapping[str, Any], picture: int, text: int) -> int:
    """FLUX.1: double blocks, single blocks whose attention and MLP share their layers."""
    d, joined = _width(config), picture + text
    double, single = config["num_layers"], config["num_single_layers"]
    embedders = 2 if config["guidance_embeds"] else 1
    pooled = config["pooled_projection_dim"]
    weights = _ends(config, d, picture, text)
    weights += embedders * _mlp(TIME_FEATURES, d) + (_mlp(pooled, d) if pooled else 0)
    weights += double * 12 * d * d * (joined + 1)  # the one: both streams' modulation
    weights += single * (12 * d * d * joined + 3 * d * d)
    return 2 * weights + (double + single) * _attention(d, joined)


def flux2(config: Mapping[str, Any], picture: int, text: int) -> int:
    """FLUX.2: gated MLPs of three parts, and modulation that all blocks of a kind share."""
    d, joined = _width(config), picture + text
    blocks = config["num_layers"] + config["num_single_layers"]
    embedders = 2 if config["guidance_embeds"] else 1
    inner = int(d * config["mlp_ratio"])
    weights = _ends(config, d, picture, text)
    weights += embedders * _mlp(config["timestep_guidance_channels"], d) + 15 * d * d
    weights += blocks * (4 * d * d + 3 * d * inner) * joined
    return 2 * weights + blocks * _attention(d, joined)


def qwen_image(config: Mapping[str, Any], picture: int, text: int) -> int:
    """Qwen-Image: double blocks alone."""
    d, joined, blocks = _width(config), picture + text, config["num_layers"]
    weights = _ends(config, d, picture, text) + _mlp(TIME_FEATURES, d)
    weights += blocks * 12 * d * d * (joined + 1)
    return 2 * weights + blocks * _attention(d, joined)


def sd3(config: Mapping[str, Any], picture: int, text: int) -> int:
    """Stable Diffusion 3: double blocks; the last writes no text, some see the picture twice."""
    d, joined, blocks = _width(config), picture + text, config["num_layers"]
    twice = len(config["dual_attention_layers"])
    weights = _patch_ends(config, d, picture) + config["joint_attention_dim"] * d * text
    weights += _mlp(TIME_FEATURES, d) + _mlp(config["pooled_projection_dim"], d)
    weights += blocks * 12 * d * d * (joined + 1)
    weights -= 9 * d * d * text + 4 * d * d  # in the last: no output, no MLP, less modulation
    weights += twice * (4 * d * d * picture + 3 * d * d)
    return 2 * weights + blocks * _attention(d, joined) + twice * _attention(d, picture)


def dit(config: Mapping[str, Any], picture: int) -> int:
    """DiT: each block embeds the time anew."""
    d, blocks = _width(config), config["num_layers"]
    weights = _patch_ends(config, d, picture)
    per_token = 16 if config["activation_fn"].endswith("glu") else 12  # gates are 4·d² more
    weights += blocks * (per_token * d * d * picture + 6 * d * d + _mlp(TIME_FEATURES, d))
    return 2 * weights + blocks * _attention(d, picture)


def _width(config: Mapping[str, Any]) -> int:
    width: int = config["num_attention_heads"] * config["attention_head_dim"]
    return width


def _attention(d: int, tokens: int) -> int:
    """Operations of scores and of their sum of values."""
    return 4 * tokens * tokens * d


def _mlp(features: int, d: int) -> int:
    """Weights of an embedder's two layers."""
    return features * d + d * d


def _ends(config: Mapping[str, Any], d: int, picture: int, text: int) -> int:
    """Weights times tokens: packed tokens in and out, text in, the output's modulation."""
    patches = 2 * config["in_channels"] * d * picture
    joint: int = config["joint_attention_dim"]
    return patches + joint * d * text + 2 * d * d


def _patch_ends(config: Mapping[str, Any], d: int, picture: int) -> int:
    """The same of models that cut patches themselves, without text."""
    patch: int = config["patch_size"] ** 2 * config["in_channels"]
    return 2 * patch * d * picture + 2 * d * d
