"""FLUX.1's architecture, of any size: diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from piflow.backbones import flops
from piflow.backbones.base import PATCH, Conditioning, pack
from piflow.backbones.transformer import TransformerBackbone, check_no_guidance, check_packing


class FluxBackbone(TransformerBackbone):
    """A `FluxTransformer2DModel` with its calling convention.

    Takes a pooled vector, and as many token states as the encoder pads to: FLUX has no text mask.
    Where a family of this class edits pictures, their tokens come after the noisy ones.

    Args:
        module: the transformer; `in_channels` must be a multiple of 4 (2×2 patches).
        embedded_guidance: FLUX.1-dev's guidance input, the same for every call; needed exactly if
            the config says `guidance_embeds`.

    Raises:
        ValueError: a config that isn't FLUX.1's kind, or guidance that doesn't fit it.
    """

    model_class = FluxTransformer2DModel
    class_name = "FluxTransformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (FluxTransformerBlock, FluxSingleTransformerBlock)
    adapter_class_names = ("GMFluxTransformer2DModel", "FluxTransformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "num_layers",
        "num_single_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "axes_dims_rope",
    )
    default_lora_targets = (
        "proj_mlp",
        "proj_out",  # the single blocks'; the model's own output layer is never adapted
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses layouts other than FLUX.1's, and guidance that the model can't take.

        Raises:
            ValueError: either.
        """
        if config["patch_size"] != 1:
            raise ValueError(
                f"expected patch_size 1 (FLUX packs its patches before the model), got "
                f"{config['patch_size']}"
            )
        check_packing(config)
        if not config["guidance_embeds"]:
            check_no_guidance("FLUX transformer", embedded_guidance)
        elif embedded_guidance is None:
            raise ValueError(
                "this model takes an embedded guidance (guidance_embeds is true) but none was "
                "given: set guidance.embedded, 3.5 for FLUX.1-dev, 4 for FLUX.2-dev"
            )

    def editing_flops(
        self, height: int, width: int, text_tokens: int, condition_tokens: int
    ) -> int:
        """Double blocks, and single blocks whose attention and MLP share their layers."""
        config, picture = self._config, height * width // PATCH**2 + condition_tokens
        d, joined = flops.hidden_size(config), picture + text_tokens
        double, single = config["num_layers"], config["num_single_layers"]
        embedders = 2 if config["guidance_embeds"] else 1
        pooled = config["pooled_projection_dim"]
        weights = flops.ends(config, d, picture, text_tokens)
        weights += embedders * flops.mlp(flops.TIME_FEATURES, d)
        weights += flops.mlp(pooled, d) if pooled else 0
        weights += double * 12 * d * d * (joined + 1)  # the one: both streams' modulation
        weights += single * (12 * d * d * joined + 3 * d * d)
        return 2 * weights + (double + single) * flops.attention(d, joined)

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at time `(B,)` -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model, or a pooled vector that is missing.
        """
        self.check_tokens(cond)
        pooled = self.pooled(cond)
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full_like(time, self.embedded_guidance)
        pictures, positions = pack(x), image_ids(x.shape[2], x.shape[3], x.device)
        noisy = pictures.shape[1]
        if cond.condition is not None:
            shown = cond.condition
            pictures = torch.cat([pictures, pack(shown).to(x)], dim=1)
            places = image_ids(shown.shape[2], shown.shape[3], x.device)
            places[:, 0] = 1  # what tells the two pictures' positions apart
            positions = torch.cat([positions, places])
        tokens: Tensor = self.module(
            hidden_states=pictures.to(self.dtype),
            timestep=time,  # the model multiplies by 1000
            guidance=guidance,
            encoder_hidden_states=cond.tokens.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            img_ids=positions,
            txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return tokens[:, :noisy]


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """`(HW/4, 3)` rotary positions of a latent's patches: (0, row, column)."""
    rows = torch.arange(height // PATCH, device=device, dtype=torch.float32)
    columns = torch.arange(width // PATCH, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
