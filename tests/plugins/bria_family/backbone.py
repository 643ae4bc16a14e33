"""Bria's architecture: diffusers' `BriaTransformer2DModel`."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_bria import (
    BriaSingleTransformerBlock,
    BriaTransformer2DModel,
    BriaTransformerBlock,
)
from torch import Tensor, nn

from piflow.backbones.base import Conditioning, pack
from piflow.backbones.flux.backbone import image_ids
from piflow.backbones.transformer import TransformerBackbone, check_no_guidance


class BriaBackbone(TransformerBackbone):
    """A `BriaTransformer2DModel` with its calling convention."""

    model_class = BriaTransformer2DModel
    class_name = "BriaTransformer2DModel"
    block_classes: tuple[type[nn.Module], ...] = (BriaTransformerBlock, BriaSingleTransformerBlock)
    adapter_class_names = ("GMBriaTransformer2DModel", "BriaTransformer2DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "num_layers",
        "num_single_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "axes_dims_rope",
    )
    default_lora_targets = (
        "proj_mlp",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        if config["patch_size"] != 1 or config["in_channels"] % 4 or config["guidance_embeds"]:
            raise ValueError("expected packed 2×2 patches and no guidance input")
        check_no_guidance("BriaTransformer2DModel", embedded_guidance)

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        return 1000 * sigma

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        self.check_tokens(cond)
        tokens: Tensor = self.module(
            hidden_states=pack(x).to(self.dtype),
            timestep=time,
            encoder_hidden_states=cond.tokens.to(self.dtype),
            img_ids=image_ids(x.shape[2], x.shape[3], x.device),
            txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return tokens
