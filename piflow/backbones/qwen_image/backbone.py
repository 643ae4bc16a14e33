"""Qwen-Image's architecture, of any size: diffusers' `QwenImageTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import (
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
)
from torch import Tensor, nn

from piflow.backbones import flops
from piflow.backbones.base import PATCH, Conditioning, pack
from piflow.backbones.transformer import TransformerBackbone, check_no_guidance, check_packing

VARIANTS = {  # switches of models that take more than a noisy picture and a prompt
    "zero_cond_t": "editing",
    "use_additional_t_cond": "layered pictures",
    "use_layer3d_rope": "layered pictures",
}


class QwenImageBackbone(TransformerBackbone):
    """A `QwenImageTransformer2DModel` with its calling convention.

    Text tokens from `num_tokens` on are masked out of the attention, so a sample depends neither on
    its neighbours nor on how far its prompt is padded. The latents' time axis, one frame long, is
    left out: `(B, 16, H, W)`.

    Args:
        module: the transformer; `in_channels` must be a multiple of 4 (2×2 patches).
        embedded_guidance: must be None; Qwen-Image has no such input.

    Raises:
        ValueError: a variant for editing or layers, or embedded guidance.
    """

    model_class = QwenImageTransformer2DModel
    class_name = "QwenImageTransformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (QwenImageTransformerBlock,)
    adapter_class_names = ("GMQwenImageTransformer2DModel", "QwenImageTransformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "num_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "axes_dims_rope",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses variants whose inputs aren't a noisy picture and a prompt alone.

        Raises:
            ValueError: one of them, or embedded guidance.
        """
        for switch, purpose in VARIANTS.items():
            if config[switch]:
                raise ValueError(
                    f"expected a text-to-image model, got {switch} = true ({purpose}): give "
                    "Qwen-Image's transformer"
                )
        if config["guidance_embeds"]:
            raise ValueError(
                "guidance_embeds is true, but diffusers' QwenImageTransformer2DModel has no "
                "embedding for a guidance: give Qwen-Image's transformer"
            )
        check_packing(config)
        check_no_guidance("QwenImageTransformer2DModel", embedded_guidance)

    @property
    def default_lora_targets(self) -> tuple[str, ...]:
        """Both streams' MLPs and the time embedding.

        The last block's text stream isn't read by anything, so its MLP would get no gradient.
        """
        text = [
            f"transformer_blocks.{i}.txt_mlp.{layer}"
            for i in range(self._config["num_layers"] - 1)
            for layer in ("net.0.proj", "net.2")
        ]
        time = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
        return ("img_mlp.net.0.proj", "img_mlp.net.2", *text, *time)

    def editing_flops(
        self, height: int, width: int, text_tokens: int, condition_tokens: int
    ) -> int:
        """Double blocks alone."""
        config, picture = self._config, height * width // PATCH**2 + condition_tokens
        d, joined, blocks = flops.hidden_size(config), picture + text_tokens, config["num_layers"]
        weights = flops.ends(config, d, picture, text_tokens) + flops.mlp(flops.TIME_FEATURES, d)
        weights += blocks * 12 * d * d * (joined + 1)
        return 2 * weights + blocks * flops.attention(d, joined)

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at time `(B,)` -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model.
        """
        self.check_tokens(cond)
        mask = None
        if not cond.full:  # attention without a mask has faster kernels
            positions = torch.arange(cond.tokens.shape[1], device=x.device)
            mask = positions < cond.num_tokens[:, None]
        pictures, shapes = pack(x), [_shape(x)]
        noisy = pictures.shape[1]
        if cond.condition is not None:
            pictures = torch.cat([pictures, pack(cond.condition).to(x)], dim=1)
            shapes.append(_shape(cond.condition))
        tokens: Tensor = self.module(
            hidden_states=pictures.to(self.dtype),
            timestep=time,  # the model multiplies by 1000
            encoder_hidden_states=cond.tokens.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * x.shape[0],
            return_dict=False,
        )[0]
        return tokens[:, :noisy]


def _shape(latents: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of a picture's tokens."""
    return 1, latents.shape[2] // PATCH, latents.shape[3] // PATCH
