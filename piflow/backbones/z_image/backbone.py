"""Z-Image (arXiv 2511.22699), of any size: diffusers' `ZImageTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    RopeEmbedder,
    ZImageTransformer2DModel,
    ZImageTransformerBlock,
)
from torch import Tensor, nn

from piflow.backbones.base import PATCH, Conditioning, pack
from piflow.backbones.recompute import Recomputing
from piflow.backbones.transformer import TransformerBackbone, channel_major, check_no_guidance

_TIME_STEPS = 1000.0
_LAYER = f"{PATCH}-1"  # of patches of 2×2 in one frame, in the model's dictionaries


class ZImageBackbone(TransformerBackbone):
    """A `ZImageTransformer2DModel` with its calling convention.

    The model predicts x0 - ε, and its time runs from 0 (noise) to 1. Its time embedding has at most
    256 features, fewer than the hidden states. The text is padded to a multiple of 32 tokens by a
    learned token that takes part in attention; what a batch pads beyond that doesn't, so a sample
    doesn't depend on its neighbours. There is no pooled vector.

    Args:
        module: the transformer; it stays usable, and shares its weights with the backbone's.
        embedded_guidance: must be None; the family has no such input.

    Raises:
        ValueError: other patches, a variant for editing, or embedded guidance.
    """

    model_class = ZImageTransformer2DModel
    class_name = "ZImageTransformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (ZImageTransformerBlock,)
    stored_output_names = ("all_final_layer",)
    velocity_sign = -1
    adapter_class_names = ("GMZImageTransformer2DModel", "ZImageTransformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "dim",
        "n_layers",
        "n_refiner_layers",
        "n_heads",
        "n_kv_heads",
        "norm_eps",
        "qk_norm",
        "cap_feat_dim",
        "rope_theta",
        "t_scale",
        "axes_dims",
    )
    default_lora_targets = (
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses models that take more than a noisy picture and a prompt, or other patches.

        Raises:
            ValueError: either, or embedded guidance.
        """
        patches = list(config["all_patch_size"]), list(config["all_f_patch_size"])
        if patches != ([PATCH], [1]):
            raise ValueError(
                f"expected all_patch_size [{PATCH}] and all_f_patch_size [1], got {patches[0]} and "
                f"{patches[1]}"
            )
        if config["siglip_feat_dim"] is not None:
            raise ValueError(
                "expected a text-to-image model, got siglip_feat_dim = "
                f"{config['siglip_feat_dim']} (editing): give Z-Image's transformer"
            )
        if config["n_kv_heads"] != config["n_heads"]:
            raise ValueError(
                f"expected n_kv_heads = n_heads = {config['n_heads']}, got {config['n_kv_heads']}: "
                "diffusers' blocks have no fewer"
            )
        check_no_guidance("ZImageTransformer2DModel", embedded_guidance)

    @staticmethod
    def adapt(module: nn.Module) -> nn.Module:
        """The same weights, batched, and ending in tokens."""
        return ZImageTokens(module)

    @property
    def text_width(self) -> int:
        """`cap_feat_dim`."""
        width: int = self._config["cap_feat_dim"]
        return width

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        """1 - sigma, which the model multiplies by 1000.

        Rounded as the family's pipeline does: at small periods of the model's sinusoids the last
        bit of the time shows.
        """
        return (_TIME_STEPS - _TIME_STEPS * sigma) / _TIME_STEPS

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at time `(B,)` -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model, or more positions than it has.
        """
        self.check_tokens(cond)
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        length = _padded(cond.tokens.shape[1])
        needed = (length + 2, rows, columns)  # the text's from 1 on, the picture's frame after it
        if any(n > most for n, most in zip(needed, self._config["axes_lens"], strict=True)):
            raise ValueError(
                f"this model has {self._config['axes_lens']} positions (text, rows, columns), "
                f"{cond.tokens.shape[1]} text tokens and latents of {x.shape[2]}×{x.shape[3]} need "
                f"{list(needed)}: use fewer tokens or smaller pictures"
            )
        num_tokens = None if cond.full else cond.num_tokens
        tokens: Tensor = self.module(x.to(self.dtype), time, cond.tokens.to(self.dtype), num_tokens)
        return tokens


class ZImageNorm(nn.Module):
    """A `FinalLayer` without its projection: a norm that the time embedding scales."""

    def __init__(self, final_layer: Any) -> None:
        super().__init__()
        self.norm: nn.Module = final_layer.norm_final
        self.activation: nn.Module = final_layer.adaLN_modulation[0]
        self.linear: nn.Module = final_layer.adaLN_modulation[1]

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, t)` -> `(B, T, d)`."""
        scale = 1 + self.linear(self.activation(temb))
        normed: Tensor = self.norm(hidden) * scale[:, None]
        return normed


class ZImageTokens(Recomputing):
    """`ZImageTransformer2DModel` over a batch, without its unpatchifying end, as one forward pass.

    The original takes and gives lists of samples. Its parts are here under their own names, but for
    the output layer: `norm_out`, and `proj_out`, a copy of its projection with a token's features
    channel-major, where the original has them patch position first.

    Args:
        model: a `ZImageTransformer2DModel`; it isn't changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.time_scale: float = config.t_scale
        self.all_x_embedder = model.all_x_embedder
        self.t_embedder = model.t_embedder
        self.cap_embedder = model.cap_embedder
        self.x_pad_token = model.x_pad_token
        self.cap_pad_token = model.cap_pad_token
        self.noise_refiner = model.noise_refiner
        self.context_refiner = model.context_refiner
        self.layers = model.layers
        self._rope = RopeEmbedder(config.rope_theta, config.axes_dims, config.axes_lens)
        final_layer = model.all_final_layer[_LAYER]
        self.norm_out: nn.Module = ZImageNorm(final_layer)
        self.proj_out: nn.Module = channel_major(final_layer.linear)
        self.train(model.training)

    def forward(
        self, latents: Tensor, time: Tensor, text: Tensor, num_tokens: Tensor | None
    ) -> Tensor:
        """One velocity's tokens a sample, negative.

        Args:
            latents: `(B, C, H, W)`.
            time: `(B,)`, 1 - sigma.
            text: `(B, L, D)` states.
            num_tokens: `(B,)`, how many of them are each prompt's; None: all.

        Returns:
            `(B, HW/4, F)`, channel-major.
        """
        temb = self.t_embedder(time * self.time_scale).type_as(latents)
        count = latents.shape[2] * latents.shape[3] // PATCH**2
        text, text_mask, text_end, text_rope = self._text(text, num_tokens)
        picture, picture_rope = self._picture(latents, text_end)
        for block in self.noise_refiner:
            picture = self.run(block, picture, None, picture_rope, temb)
        for block in self.context_refiner:
            text = self.run(block, text, text_mask, text_rope)
        hidden = torch.cat([picture, text], dim=1)
        rope = torch.cat([picture_rope, text_rope], dim=1)
        mask = None
        if text_mask is not None:
            mask = torch.cat([text_mask.new_ones(picture.shape[:2]), text_mask], dim=1)
        for block in self.layers:
            hidden = self.run(block, hidden, mask, rope, temb)
        tokens: Tensor = self.proj_out(self.norm_out(hidden[:, :count], temb))
        return tokens

    def _text(
        self, states: Tensor, num_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Text tokens `(B, L', d)`, the mask, where each sample's text ends `(B,)`, rotations."""
        batch, length = states.shape[:2]
        padded = _padded(length)
        places = torch.arange(padded, device=states.device)
        embedded = nn.functional.pad(self.cap_embedder(states), (0, 0, 0, padded - length))
        if num_tokens is None:
            own = (places < length).expand(batch, -1)
            end = torch.full((batch,), padded, device=states.device)
            mask = None
        else:
            own = places < num_tokens[:, None]
            end = SEQ_MULTI_OF * (-(-num_tokens // SEQ_MULTI_OF)).clamp(min=1)
            mask = places < end[:, None]
        tokens = torch.where(own[..., None], embedded, self.cap_pad_token)
        ids = nn.functional.pad((1 + places)[:, None], (0, 2))  # (place, 0, 0)
        return tokens, mask, end, self._rope(ids).expand(batch, -1, -1)

    def _picture(self, latents: Tensor, text_end: Tensor) -> tuple[Tensor, Tensor]:
        """The picture's tokens `(B, T', d)`, T' a multiple of 32, and their rotations."""
        batch, channels, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        by_position = pack(latents).unflatten(2, (channels, PATCH * PATCH)).mT.flatten(2)
        embedded = self.all_x_embedder[_LAYER](by_position)
        missing = _padded(rows * columns) - rows * columns
        pads = self.x_pad_token.expand(batch, missing, -1)
        device = latents.device
        grid = torch.cartesian_prod(
            torch.arange(rows, device=device), torch.arange(columns, device=device)
        )
        frame = (1 + text_end)[:, None, None].expand(-1, len(grid), -1)
        ids = torch.cat([frame, grid.expand(batch, -1, -1)], dim=2)
        ids = nn.functional.pad(ids, (0, 0, 0, missing))  # pads lie at (0, 0, 0)
        rope = self._rope(ids.flatten(0, 1)).unflatten(0, (batch, -1))
        return torch.cat([embedded, pads], dim=1), rope


def _padded(tokens: int) -> int:
    """The next multiple of 32, as the model wants its sequences."""
    return SEQ_MULTI_OF * max(1, -(-tokens // SEQ_MULTI_OF))
