"""Class-conditional DiT (arXiv 2212.09748), of any size: diffusers' `DiTTransformer2DModel`.

The published DiTs predict a diffusion model's noise. Here the same architecture is a flow model:
its time input is 1000·σ, unrounded, and its output the velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from piflow.backbones import flops
from piflow.backbones.base import PATCH, Conditioning
from piflow.backbones.recompute import Recomputing
from piflow.backbones.transformer import (
    TransformerBackbone,
    channel_major,
    check_no_guidance,
    reordered,
    rows_by_channel,
    rows_by_position,
)

TIME_SCALE = 1000.0  # of σ, in the sinusoidal embedding


class DiTBackbone(TransformerBackbone):
    """A `DiTTransformer2DModel` as a class-conditional flow model.

    `Conditioning.pooled` is the class number, `(B, 1)` float32; `num_embeds_ada_norm` itself is the
    null class, the empty prompt. The token states aren't used. Latents have the one size that the
    config says.

    Args:
        module: the transformer, which is taken apart: don't use it any more.
        embedded_guidance: must be None; DiT has no such input.

    Raises:
        ValueError: a model that doesn't predict a velocity over 2×2 patches, or has dropout; or
            embedded guidance.
    """

    model_class = DiTTransformer2DModel
    class_name = "DiTTransformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (BasicTransformerBlock,)
    stored_output_names = ("norm_out", "proj_out_1", "proj_out_2")
    fixed_size = True
    adapter_class_names = ("GMDiTTransformer2DModel", "DiTTransformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "num_layers",
        "attention_head_dim",
        "num_attention_heads",
        "sample_size",
        "num_embeds_ada_norm",
        "activation_fn",
        "attention_bias",
        "norm_elementwise_affine",
        "norm_eps",
    )
    default_lora_targets = (
        "ff.net.0.proj",
        "ff.net.2",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses models that don't predict a velocity over 2×2 patches.

        Raises:
            ValueError: another patch size, an odd latent size, other output channels than input
                channels, dropout, or embedded guidance.
        """
        if config["patch_size"] != PATCH or config["sample_size"] % PATCH:
            raise ValueError(
                f"expected patch_size {PATCH} and an even sample_size, got {config['patch_size']} "
                f"and {config['sample_size']}"
            )
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ValueError(
                f"expected out_channels = in_channels = {config['in_channels']} (a velocity), got "
                f"{config['out_channels']}: a DiT that predicts noise and its variance is a "
                "diffusion model; give one trained by flow matching"
            )
        if config["dropout"]:
            raise ValueError(
                f"expected dropout 0, got {config['dropout']}: the teacher shares the student's "
                "module, and its velocity would be random in training; set it to 0 in config.json"
            )
        check_no_guidance("DiTTransformer2DModel", embedded_guidance)

    @staticmethod
    def adapt(module: nn.Module) -> nn.Module:
        """The same weights, ending in tokens."""
        return DiTTokens(module)

    @staticmethod
    def stored_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The modulation as `proj_out_1`, shift first; the projection's rows by patch position."""
        stored = {}
        for kind in ("weight", "bias"):
            modulation = tensors[f"norm_out.linear.{kind}"]
            stored[f"proj_out_1.{kind}"] = modulation.roll(len(modulation) // 2, 0)
            stored[f"proj_out_2.{kind}"] = rows_by_position(tensors[f"proj_out.{kind}"])
        return stored

    @staticmethod
    def read_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        found = {}
        for kind in ("weight", "bias"):
            modulation = tensors[f"proj_out_1.{kind}"]
            found[f"norm_out.linear.{kind}"] = modulation.roll(len(modulation) // 2, 0)
            found[f"proj_out.{kind}"] = rows_by_channel(tensors[f"proj_out_2.{kind}"])
        return found

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """Each block embeds the time anew."""
        config, picture = self._config, height * width // PATCH**2
        d, blocks = flops.hidden_size(config), config["num_layers"]
        weights = flops.patch_ends(config, d, picture)
        per_token = 16 if config["activation_fn"].endswith("glu") else 12  # gates are 4·d² more
        embedder = flops.mlp(flops.TIME_FEATURES, d)
        weights += blocks * (per_token * d * d * picture + 6 * d * d + embedder)
        return 2 * weights + blocks * flops.attention(d, picture)

    def blank_conditioning(self, text_tokens: int) -> Conditioning:
        """The first class."""
        one = torch.ones(1, dtype=torch.long)
        return Conditioning(torch.zeros(1, 1, 1), one, torch.zeros(1, 1))

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        """1000 sigma, which the model doesn't multiply itself."""
        return sigma * TIME_SCALE

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, S, S)` at time `(B,)` -> `(B, SS/4, F)`.

        Raises:
            ValueError: latents of another size than the model's, or class numbers that it doesn't
                have. Numbers on an accelerator aren't read, since that would wait for it: the
                embedding's own range check stops the program there.
        """
        size = self._config["sample_size"]
        if x.shape[2:] != (size, size):
            raise ValueError(
                f"this model takes latents of {size}×{size} alone, got {x.shape[2]}×{x.shape[3]}: "
                "its positions are fixed; embed the prompts at that size"
            )
        tokens: Tensor = self.module(
            x.to(self.dtype), time, _labels(cond, self._config["num_embeds_ada_norm"])
        )
        return tokens


class DiTTokens(Recomputing):
    """`DiTTransformer2DModel` without its unpatchifying end, as one forward pass.

    The original embeds time and class a second time for the output layer, with the first block's
    embedder, called from outside that block. A block that is sharded on its own doesn't hold its
    weights then. So the first block's embedder stands before the blocks here, and the block is
    given its result. Label dropout, which the original applies in training mode, is off.

    Args:
        model: is taken apart; its blocks are this module's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed
        self.transformer_blocks = model.transformer_blocks
        first = self.transformer_blocks[0].norm1
        self.time_class_embed, first.emb = first.emb, _Embedded()
        self.norm_out: nn.Module = _adaptive_norm(model.norm_out, model.proj_out_1)
        self.proj_out: nn.Module = channel_major(model.proj_out_2)
        for layer in self.modules():
            if isinstance(layer, LabelEmbedding):
                layer.dropout_prob = 0.0
        self.train(model.training)

    def forward(self, hidden: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Latents `(B, C, S, S)`, 1000·σ `(B,)`, class numbers `(B,)` -> `(B, SS/4, F)`."""
        hidden = self.pos_embed(hidden)
        temb = self.time_class_embed(timestep, labels, hidden_dtype=hidden.dtype)
        for i, block in enumerate(self.transformer_blocks):
            time = timestep if i else temb
            hidden = self.run(block, hidden, timestep=time, class_labels=labels)
        tokens: Tensor = self.proj_out(self.norm_out(hidden, temb))
        return tokens


class _Embedded(nn.Module):
    """In place of an embedder: what comes as the time is the embedding already."""

    def forward(self, embedding: Tensor, labels: Tensor, hidden_dtype: torch.dtype) -> Tensor:
        return embedding


def _labels(cond: Conditioning, null_class: int) -> Tensor:
    """`(B,)` class numbers, int64.

    Half precision is refused: it would round 999 to 1000, which is the null class.
    """
    pooled = cond.pooled
    if pooled is None or pooled.shape[1] != 1 or pooled.dtype != torch.float32:
        came = "none" if pooled is None else f"{tuple(pooled.shape)} {pooled.dtype}"
        raise ValueError(
            f"this model takes class numbers as a pooled vector (B, 1) of float32, got {came}: "
            "embed the prompts with encoder.type class_label"
        )
    labels = pooled[:, 0].long()
    if pooled.device.type == "cpu":
        wrong = (labels != pooled[:, 0]) | (labels < 0) | (labels > null_class)
        if wrong.any():
            raise ValueError(
                f"expected whole class numbers from 0 to {null_class - 1}, or {null_class} for the "
                f"null class, got {pooled[wrong][0].item()}: embed the prompts with "
                f"encoder.num_classes {null_class}"
            )
    return labels


def _adaptive_norm(norm: nn.LayerNorm, modulation: nn.Linear) -> AdaLayerNormContinuous:
    """The output layer's norm and modulation as one module; scale before shift in its rows."""
    width = modulation.in_features
    with torch.device("meta"):  # its random weights are never drawn
        adaptive = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=norm.eps)
    shift_first = torch.arange(2 * width, device=modulation.weight.device)
    adaptive.linear = reordered(modulation, shift_first.roll(width))
    return adaptive
