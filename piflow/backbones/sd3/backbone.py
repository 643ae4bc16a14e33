"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): diffusers' `SD3Transformer2DModel`, any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from piflow.backbones import flops
from piflow.backbones.base import PATCH, Conditioning
from piflow.backbones.recompute import Recomputing
from piflow.backbones.transformer import (
    TransformerBackbone,
    channel_major,
    check_no_guidance,
    rows_by_channel,
    rows_by_position,
)

TIME_SCALE = 1000.0  # the model's time is 1000·σ, which its pipeline passes


class SD3Backbone(TransformerBackbone):
    """An `SD3Transformer2DModel` with its calling convention.

    Takes CLIP and T5 states as one sequence and a pooled vector; there is no text mask. Positions
    are cut from the middle of a table of `pos_embed_max_size` squared patches, so latents may have
    any aspect ratio up to that size.

    Args:
        module: the transformer; it stays usable, and shares its weights with the backbone's.
        embedded_guidance: must be None; the family has no such input.

    Raises:
        ValueError: a model that doesn't predict a velocity over 2×2 patches, or embedded guidance.
    """

    model_class = SD3Transformer2DModel
    class_name = "SD3Transformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (JointTransformerBlock,)
    adapter_class_names = ("GMSD3Transformer2DModel", "SD3Transformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "num_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "caption_projection_dim",
        "pooled_projection_dim",
        "pos_embed_max_size",
        "dual_attention_layers",
        "qk_norm",
    )
    default_lora_targets = (
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",  # the last block has none: nothing reads its text stream
        "ff_context.net.2",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses models that don't predict a velocity over 2×2 patches.

        Raises:
            ValueError: another patch size, no table of positions, other output channels than input
                channels, or embedded guidance.
        """
        if config["patch_size"] != PATCH or not config["pos_embed_max_size"]:
            raise ValueError(
                f"expected patch_size {PATCH} and a pos_embed_max_size, got "
                f"{config['patch_size']} and {config['pos_embed_max_size']}"
            )
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ValueError(
                f"expected out_channels = in_channels = {config['in_channels']} (a velocity), got "
                f"{config['out_channels']}: models that take more than noisy latents aren't covered"
            )
        check_no_guidance("SD3Transformer2DModel", embedded_guidance)

    @staticmethod
    def adapt(module: nn.Module) -> nn.Module:
        """The same weights, ending in tokens."""
        positions: Any = module.get_submodule("pos_embed")
        # a model that was built without weights computed it in float32, one that was loaded has it
        # in the weights' dtype
        positions.pos_embed = positions.pos_embed.to(next(module.parameters()).dtype)
        return SD3Tokens(module)

    @staticmethod
    def stored_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The projection's rows by patch position."""
        return {
            name: rows_by_position(tensor) if name.startswith("proj_out.") else tensor
            for name, tensor in tensors.items()
        }

    @staticmethod
    def read_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        return {
            name: rows_by_channel(tensor) if name.startswith("proj_out.") else tensor
            for name, tensor in tensors.items()
        }

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """Double blocks; the last writes no text, some see the picture twice."""
        config, picture = self._config, height * width // PATCH**2
        d, joined, blocks = flops.hidden_size(config), picture + text_tokens, config["num_layers"]
        twice = len(config["dual_attention_layers"])
        weights = flops.patch_ends(config, d, picture)
        weights += config["joint_attention_dim"] * d * text_tokens
        weights += flops.mlp(flops.TIME_FEATURES, d) + flops.mlp(config["pooled_projection_dim"], d)
        weights += blocks * 12 * d * d * (joined + 1)
        # less what the last block lacks: the text's output and MLP, and modulation
        weights -= 9 * d * d * text_tokens + 4 * d * d
        weights += twice * (4 * d * d * picture + 3 * d * d)
        attention = blocks * flops.attention(d, joined) + twice * flops.attention(d, picture)
        return 2 * weights + attention

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        """1000 sigma, which the model doesn't multiply itself."""
        return sigma * TIME_SCALE

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at time `(B,)` -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model, or a pooled vector that is missing.
        """
        self.check_tokens(cond)
        pooled = self.pooled(cond)
        limit = PATCH * self._config["pos_embed_max_size"]
        height, width = x.shape[2:]
        if height % PATCH or width % PATCH or max(height, width) > limit:
            raise ValueError(
                f"latent height and width must be even and at most {limit} for this model, got "
                f"{height}×{width}"
            )
        tokens: Tensor = self.module(
            x.to(self.dtype), time, cond.tokens.to(self.dtype), pooled.to(self.dtype)
        )
        return tokens


class SD3Tokens(Recomputing):
    """`SD3Transformer2DModel` without its unpatchifying end, as one forward pass.

    Its parts are the model's own under their own names, but for `proj_out`: a copy of it with a
    token's features channel-major, where the original has them patch position first.

    Args:
        model: an `SD3Transformer2DModel`; it isn't changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed
        self.time_text_embed = model.time_text_embed
        self.context_embedder = model.context_embedder
        self.transformer_blocks = model.transformer_blocks
        self.norm_out: nn.Module = model.norm_out
        self.proj_out: nn.Module = channel_major(model.proj_out)
        self.train(model.training)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Latents `(B, C, H, W)`, 1000·σ `(B,)`, text states `(B, L, D)` -> `(B, HW/4, F)`."""
        hidden = self.pos_embed(latents).contiguous()
        temb = self.time_text_embed(timestep, pooled)
        text = self.context_embedder(text)
        for block in self.transformer_blocks:
            text, hidden = self.run(block, hidden, text, temb)
        tokens: Tensor = self.proj_out(self.norm_out(hidden, temb))
        return tokens
