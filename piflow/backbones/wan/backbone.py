"""Wan 2.1's text-to-video models (arXiv 2503.20314): diffusers' `WanTransformer3DModel`.

Latents come as everywhere, `(B, C, H, W)`, and hold a video's frames one below the other: H is
`latent_frames` times a frame's height. So whatever is computed at each place alone (policies,
samplers, losses) knows of no frames, and the tokens, frame by frame and row by row, are those of a
tall picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_wan import (
    WanTransformer3DModel,
    WanTransformerBlock,
)
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
_PATCHES = (1, PATCH, PATCH)  # frames, rows, columns
_TABLE = "scale_shift_table"  # the output's modulation; in the files it lies beside the norm
_PICTURES = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")  # of models that take some


class WanBackbone(TransformerBackbone):
    """A `WanTransformer3DModel` with its calling convention.

    Text states are zeros from a prompt's end on, and the model attends to those as well: there is
    no mask and no pooled vector. Some parameters stay in float32 whatever dtype is asked for, as
    diffusers keeps them.

    Args:
        module: the transformer; it stays usable, and shares its weights with the backbone's.
        embedded_guidance: must be None; the family has no such input.

    Raises:
        ValueError: a model that takes pictures as well, other patches, or embedded guidance.
    """

    model_class = WanTransformer3DModel
    class_name = "WanTransformer3DModel"
    block_classes: tuple[type[nn.Module], ...] = (WanTransformerBlock,)
    stored_output_names = ("norm_out", "proj_out", _TABLE)
    adapter_class_names = ("GMWanTransformer3DModel", "WanTransformer3DModel")
    adapter_fields: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "num_layers",
        "attention_head_dim",
        "num_attention_heads",
        "ffn_dim",
        "text_dim",
        "freq_dim",
        "cross_attn_norm",
        "qk_norm",
        "eps",
        "rope_max_seq_len",
        "patch_size",
    )
    default_lora_targets = (
        "ffn.net.0.proj",
        "ffn.net.2",
        "time_embedder.linear_1",
        "time_embedder.linear_2",
    )

    @staticmethod
    def check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
        """Refuses models that take more than a noisy video and a prompt, or other patches.

        Raises:
            ValueError: either, other output channels than input channels, or embedded guidance.
        """
        if tuple(config["patch_size"]) != _PATCHES:
            raise ValueError(
                f"expected patch_size {list(_PATCHES)} (frames, rows, columns), got "
                f"{list(config['patch_size'])}"
            )
        for key in _PICTURES:
            if config[key] is not None:
                raise ValueError(
                    f"expected a text-to-video model, got {key} = {config[key]} (image to video): "
                    "give a transformer of Wan 2.1 T2V"
                )
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ValueError(
                f"expected out_channels = in_channels = {config['in_channels']} (a velocity), got "
                f"{config['out_channels']}: models that take more than noisy latents aren't covered"
            )
        check_no_guidance("WanTransformer3DModel", embedded_guidance)

    @staticmethod
    def adapt(module: nn.Module) -> nn.Module:
        """The same weights, ending in tokens."""
        return WanTokens(module)

    @staticmethod
    def stored_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The projection's rows by patch position, and the modulation beside the norm."""
        return {
            name.removeprefix("norm_out."): (
                rows_by_position(tensor) if name.startswith("proj_out.") else tensor
            )
            for name, tensor in tensors.items()
        }

    @staticmethod
    def read_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        return {
            f"norm_out.{name}" if name == _TABLE else name: (
                rows_by_channel(tensor) if name.startswith("proj_out.") else tensor
            )
            for name, tensor in tensors.items()
        }

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """Blocks of attention among the video's tokens, attention to the text's, and an MLP.

        Args:
            height: of all frames together.
        """
        config, video = self._config, height * width // PATCH**2
        d, blocks = flops.hidden_size(config), config["num_layers"]
        weights = 2 * PATCH**2 * config["in_channels"] * d * video
        weights += flops.mlp(config["text_dim"], d) * text_tokens
        weights += flops.mlp(config["freq_dim"], d) + 6 * d * d
        weights += blocks * (6 * d + 2 * config["ffn_dim"]) * d * video
        weights += blocks * 2 * d * d * text_tokens
        attention = 4 * video * (video + text_tokens) * d
        return 2 * weights + blocks * attention

    @property
    def text_width(self) -> int:
        """`text_dim`."""
        width: int = self._config["text_dim"]
        return width

    @staticmethod
    def time_of(sigma: Tensor) -> Tensor:
        """1000 sigma, which the model doesn't multiply itself."""
        return sigma * TIME_SCALE

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at time `(B,)` -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model, or more positions than it has.
        """
        self.check_tokens(cond)
        frames, rows = self.latent_frames, x.shape[2]
        step = PATCH * frames
        if rows % step or x.shape[3] % PATCH:
            raise ValueError(
                f"latents of {rows}×{x.shape[3]} aren't {frames} frames of even height and width, "
                "one below the other: set model.frames as the video has, and a frame's height and "
                "width to multiples of 16 pixels"
            )
        places = (frames, rows // step, x.shape[3] // PATCH)
        limit: int = self._config["rope_max_seq_len"]
        if max(places) > limit:
            raise ValueError(
                f"this model has {limit} positions each way, and a video of {places} tokens "
                "(frames, rows, columns) needs more: use fewer frames or smaller ones"
            )
        video = x.unflatten(2, (frames, -1)).to(self.dtype)
        tokens: Tensor = self.module(video, time, cond.tokens.to(self.dtype))
        return tokens


class WanNorm(nn.Module):
    """The model's last norm with the table that, with the time embedding, shifts and scales it."""

    def __init__(self, norm: nn.Module, table: nn.Parameter) -> None:
        super().__init__()
        self.norm = norm
        self.scale_shift_table = table

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, d)` -> `(B, T, d)`, computed in float32 as in diffusers."""
        shift, scale = (self.scale_shift_table + temb[:, None]).chunk(2, dim=1)
        normed: Tensor = self.norm(hidden.float()) * (1 + scale) + shift
        return normed.type_as(hidden)


class WanTokens(Recomputing):
    """`WanTransformer3DModel` without its unpatchifying end, as one forward pass.

    Its parts are the model's own under their own names, but for the output layer: `norm_out`, which
    has the model's `scale_shift_table`, and `proj_out`, a copy of its projection with a token's
    features channel-major, where the original has them patch position first.

    Args:
        model: a `WanTransformer3DModel`; it isn't changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rope = model.rope
        self.patch_embedding = model.patch_embedding
        self.condition_embedder = model.condition_embedder
        self.blocks = model.blocks
        self.norm_out: nn.Module = WanNorm(model.norm_out, model.scale_shift_table)
        self.proj_out: nn.Module = channel_major(model.proj_out)
        self.train(model.training)

    def forward(self, video: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Latents `(B, C, F, h, w)`, 1000·σ `(B,)`, text states `(B, L, D)` -> `(B, Fhw/4, 4C)`."""
        rope = self.rope(video)
        hidden = self.patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
        temb, modulation, text, _ = self.condition_embedder(timestep, text, None)
        modulation = modulation.unflatten(1, (6, -1))
        for block in self.blocks:
            hidden = self.run(block, hidden, text, modulation, rope)
        tokens: Tensor = self.proj_out(self.norm_out(hidden, temb))
        return tokens
