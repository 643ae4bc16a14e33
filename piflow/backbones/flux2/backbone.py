"""FLUX.2's architecture, of any size: diffusers' `Flux2Transformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2SingleTransformerBlock,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
)
from torch import Tensor, nn

from piflow.backbones import flops
from piflow.backbones.base import PATCH, Conditioning, pack
from piflow.backbones.flux.backbone import FluxBackbone, image_ids
from piflow.backbones.transformer import TransformerBackbone


class Flux2Backbone(TransformerBackbone):
    """A `Flux2Transformer2DModel` with its calling convention.

    Takes as many token states as the encoder pads to, with a position each: there is no text mask,
    and no pooled vector.

    Args:
        module: the transformer; `in_channels` must be a multiple of 4 (2×2 patches).
        embedded_guidance: FLUX.2-dev's guidance input, the same for every call; needed exactly if
            the config says `guidance_embeds`.

    Raises:
        ValueError: a config that isn't FLUX.2's kind, or guidance that doesn't fit it.
    """

    model_class = Flux2Transformer2DModel
    class_name = "Flux2Transformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (
        Flux2TransformerBlock,
        Flux2SingleTransformerBlock,
    )
    adapter_class_names = ("GMFlux2Transformer2DModel", "Flux2Transformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "num_layers",
        "num_single_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "mlp_ratio",
        "guidance_embeds",
        "axes_dims_rope",
        "rope_theta",
    )
    default_lora_targets = (
        "attn.to_qkv_mlp_proj",  # the single blocks', where attention and MLP are one layer
        "attn.to_out",  # the single blocks'; the double ones' is a list
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses layouts other than FLUX's, and guidance that the model can't take.

        Raises:
            ValueError: either, or positions of other than four axes.
        """
        FluxBackbone.check_config(config, embedded_guidance)
        if len(config["axes_dims_rope"]) != 4:
            raise ValueError(
                "expected axes_dims_rope of four axes (time, row, column, token), got "
                f"{list(config['axes_dims_rope'])}"
            )

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """Gated MLPs of three parts, and modulation that all blocks of a kind share."""
        config, picture = self._config, height * width // PATCH**2
        d, joined = flops.hidden_size(config), picture + text_tokens
        blocks = config["num_layers"] + config["num_single_layers"]
        embedders = 2 if config["guidance_embeds"] else 1
        inner = int(d * config["mlp_ratio"])
        weights = flops.ends(config, d, picture, text_tokens)
        weights += embedders * flops.mlp(config["timestep_guidance_channels"], d) + 15 * d * d
        weights += blocks * (4 * d * d + 3 * d * inner) * joined
        return 2 * weights + blocks * flops.attention(d, joined)

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at time `(B,)` -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model.
        """
        self.check_tokens(cond)
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full_like(time, self.embedded_guidance)
        places = image_ids(x.shape[2], x.shape[3], x.device)  # (0, row, column)
        numbers = torch.arange(cond.tokens.shape[1], device=x.device, dtype=places.dtype)
        tokens: Tensor = self.module(
            hidden_states=pack(x).to(self.dtype),
            timestep=time,  # the model multiplies by 1000, and the guidance too
            guidance=guidance,
            encoder_hidden_states=cond.tokens.to(self.dtype),
            img_ids=nn.functional.pad(places, (0, 1))[None],
            txt_ids=nn.functional.pad(numbers[:, None], (3, 0))[None],
            return_dict=False,
        )[0]
        return tokens
