"""FLUX.1's architecture, of any size: diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from piflow.backbones.base import Conditioning
from piflow.storage import local_folder

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """`(B, C, H, W)` -> `(B, HW/4, 4C)`: 2×2 patches, row by row, channel-major inside.

    Raises:
        ValueError: H or W is odd.
    """
    batch, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latent height and width must be even, got {height}×{width}")
    rows, columns = height // PATCH, width // PATCH
    patches = latents.reshape(batch, channels, rows, PATCH, columns, PATCH)
    patches = patches.permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """`(B, HW/4, 4C)` -> `(B, C, H, W)`, the inverse of `pack`."""
    batch, _, features = tokens.shape
    rows, columns, channels = height // PATCH, width // PATCH, features // (PATCH * PATCH)
    patches = tokens.reshape(batch, rows, columns, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """`(HW/4, 3)` rotary positions of a latent's patches: (0, row, column)."""
    rows = torch.arange(height // PATCH, device=device, dtype=torch.float32)
    columns = torch.arange(width // PATCH, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


class FluxBackbone:
    """A `FluxTransformer2DModel` with its calling convention.

    Args:
        module: the transformer; `in_channels` must be a multiple of 4 (2×2 patches).
        embedded_guidance: FLUX.1-dev's guidance input, the same for every call; needed exactly if
            the config says `guidance_embeds`.

    Raises:
        ValueError: a config that isn't FLUX.1's kind, or guidance that doesn't fit it.
    """

    block_classes: tuple[type[nn.Module], ...] = (FluxTransformerBlock, FluxSingleTransformerBlock)
    default_lora_targets: tuple[str, ...] = (
        "proj_mlp",
        "proj_out",  # the single blocks'; the model's own output layer is never adapted
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    def __init__(self, module: nn.Module, *, embedded_guidance: float | None = None) -> None:
        if not isinstance(module, FluxTransformer2DModel):
            raise ValueError(f"expected a FluxTransformer2DModel, got {type(module).__name__}")
        config: Mapping[str, Any] = module.config
        _check_config(config, embedded_guidance)
        self.module: nn.Module = module
        self.dtype: torch.dtype = module.x_embedder.weight.dtype
        self.width: int = module.inner_dim
        self.latent_channels: int = config["in_channels"] // (PATCH * PATCH)
        self.embedded_guidance = embedded_guidance
        self._transformer = module
        self._config = {key: value for key, value in config.items() if not key.startswith("_")}

    @classmethod
    def load(
        cls,
        uri: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        embedded_guidance: float | None = None,
    ) -> FluxBackbone:
        """Loads a diffusers folder (config.json + safetensors) from a URI, in evaluation mode.

        Raises:
            ValueError: no config.json there, another model class, or weights that are missing.
        """
        folder = Path(local_folder(str(uri)))
        _check_folder(folder, str(uri))
        module, info = FluxTransformer2DModel.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{uri}: the weights lack {len(missing)} tensors of the config's model "
                f"({', '.join(missing[:3])}, …): config and weights don't belong together"
            )
        return cls(module.to(device), embedded_guidance=embedded_guidance)

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments, as in config.json."""
        return dict(self._config)

    def output_tokens(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Latents `(B, C, H, W)` at noise levels sigma `(B,)` in [0, 1] -> `(B, HW/4, F)`.

        Raises:
            ValueError: shapes that don't fit the model, or a pooled vector that is missing.
        """
        pooled = self._check_inputs(x, sigma, cond)
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full_like(sigma, self.embedded_guidance)
        tokens: Tensor = self._transformer(
            hidden_states=pack(x).to(self.dtype),
            timestep=sigma,  # the model multiplies by 1000
            guidance=guidance,
            encoder_hidden_states=cond.tokens.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            img_ids=image_ids(x.shape[2], x.shape[3], x.device),
            txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return tokens

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """`(B, C, H, W)` float32 velocity u = ε - x0, unguided.

        Args and errors as `output_tokens`.
        """
        tokens = self.output_tokens(x, sigma, cond)
        return self.unpack(tokens.float(), x.shape[2], x.shape[3])

    @torch.no_grad()
    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The same without gradients."""
        return self(x, sigma, cond)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """`(B, HW/4, 4F)` -> `(B, F, H, W)`."""
        return unpack(tokens, height, width)

    def output_layers(self) -> tuple[nn.Module, nn.Linear]:
        """The teacher's `norm_out` and `proj_out`.

        Raises:
            ValueError: they were replaced already.
        """
        projection = self._transformer.proj_out
        if not isinstance(projection, nn.Linear):
            raise ValueError(
                "this backbone's output layer was already replaced: load a fresh backbone for "
                "each trio"
            )
        return self._transformer.norm_out, projection

    def install_output(self, output: nn.Module) -> None:
        """Makes `output(hidden, temb)` the model's last layer.

        It takes `norm_out`'s place, which FLUX calls with both arguments, and `proj_out` becomes
        the identity: the forward pass stays diffusers' own, tensors in, tensor out, so sharding and
        checkpointing hooks see nothing unusual.
        """
        self.output_layers()
        self._transformer.norm_out = output
        self._transformer.proj_out = nn.Identity()

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self._transformer.enable_gradient_checkpointing()

    def _check_inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Refuses shapes that would fail deep inside the model; returns the pooled vector."""
        if x.ndim != 4 or x.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must be (B, {self.latent_channels}, H, W) for this model, "
                f"got {tuple(x.shape)}"
            )
        if sigma.shape != x.shape[:1] or cond.batch_size != x.shape[0]:
            raise ValueError(
                f"one sigma and one prompt a sample: latents hold {x.shape[0]}, sigma is "
                f"{tuple(sigma.shape)}, the conditioning holds {cond.batch_size}"
            )
        expected = self._config["joint_attention_dim"]
        if cond.tokens.shape[2] != expected:
            raise ValueError(
                f"this model takes token states of width {expected}, got {cond.tokens.shape[2]}: "
                "embed the prompts with the encoder it was trained with"
            )
        pooled_dim = self._config["pooled_projection_dim"]
        if cond.pooled is None or cond.pooled.shape[1] != pooled_dim:
            came = "none" if cond.pooled is None else f"width {cond.pooled.shape[1]}"
            raise ValueError(
                f"this model takes a pooled vector of width {pooled_dim}, got {came}: "
                "embed the prompts with the encoder it was trained with"
            )
        return cond.pooled


def _check_folder(folder: Path, uri: str) -> None:
    """Refuses folders that aren't a FLUX transformer's."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{uri} has no config.json: give the folder of a diffusers FluxTransformer2DModel "
            "(of a whole pipeline, its `transformer` subfolder)"
        )
    name = json.loads(path.read_text()).get("_class_name")
    if name != "FluxTransformer2DModel":
        raise ValueError(f"{uri}: expected a FluxTransformer2DModel, config.json says {name!r}")


def _check_config(config: Mapping[str, Any], embedded_guidance: float | None) -> None:
    """Refuses layouts other than FLUX.1's, and guidance that the model can't take."""
    if config["patch_size"] != 1 or config["in_channels"] % (PATCH * PATCH):
        raise ValueError(
            f"expected patch_size 1 and in_channels a multiple of {PATCH * PATCH} (packed 2×2 "
            f"patches), got {config['patch_size']} and {config['in_channels']}"
        )
    if config["guidance_embeds"] and embedded_guidance is None:
        raise ValueError(
            "this model takes an embedded guidance (guidance_embeds is true) but none was given: "
            "set guidance.embedded, 3.5 for FLUX.1-dev"
        )
    if not config["guidance_embeds"] and embedded_guidance is not None:
        raise ValueError(
            f"embedded guidance {embedded_guidance} was given but this model takes none "
            "(guidance_embeds is false): leave guidance.embedded out and use guidance.scale"
        )
