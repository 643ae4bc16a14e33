"""The adapters under test: the families and the documentation's example, or --backbone's.

An adapter comes as a function that returns

    (backbone, conditioning, (height, width))

a fresh tiny backbone in float32 and evaluation mode, with random weights that are the same at every
call; three prompts that all differ, of different lengths if the family's text is ragged; and the
latents' size, not square if the family allows that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from piflow.backbones import (
    Backbone,
    Conditioning,
    DiTBackbone,
    Flux2Backbone,
    FluxBackbone,
    FluxKontextBackbone,
    QwenImageBackbone,
    QwenImageEditBackbone,
    SD3Backbone,
    WanBackbone,
    ZImageBackbone,
)
from piflow.backbones.base import pack
from piflow.backbones.flux.backbone import image_ids

Case = tuple[Backbone, Conditioning, tuple[int, int]]


def flux() -> Case:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), torch.randn(3, 5))
    return FluxBackbone(model.eval()), cond, (4, 8)


def flux_kontext() -> Case:
    """With pictures to be edited of another size."""
    backbone, cond, size = flux()
    shown = torch.randn(3, 4, 6, 4)
    return FluxKontextBackbone(backbone.module), cond.editing(shown), size


class OnePixelFlux(FluxBackbone):
    """A FLUX whose tokens are single latent pixels: another patch size, declared."""

    patch_size = 1

    def model_tokens(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        tokens: Tensor = self.module(
            hidden_states=pack(x, self.patch_size),
            timestep=time,
            encoder_hidden_states=cond.tokens,
            pooled_projections=self.pooled(cond),
            img_ids=image_ids(2 * x.shape[2], 2 * x.shape[3], x.device),
            txt_ids=torch.zeros(cond.tokens.shape[1], 3),
            return_dict=False,
        )[0]
        return tokens

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        return super().flops(2 * height, 2 * width, text_tokens)


def one_pixel() -> Case:
    backbone, cond, (height, width) = flux()
    return OnePixelFlux(backbone.module), cond, (height // 2, width // 2)


def flux2() -> Case:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4))
    return Flux2Backbone(model.eval(), embedded_guidance=4.0), cond, (4, 8)


def qwen_image() -> Case:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        axes_dims_rope=(2, 2, 4),
    )
    cond = Conditioning(torch.randn(3, 5, 6), torch.tensor([5, 1, 3]))
    return QwenImageBackbone(model.eval()), cond, (4, 8)


def qwen_image_edit() -> Case:
    """With pictures to be edited of another size."""
    backbone, cond, size = qwen_image()
    shown = torch.randn(3, 4, 6, 4)
    return QwenImageEditBackbone(backbone.module), cond.editing(shown), size


def sd3() -> Case:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    cond = Conditioning(torch.randn(3, 4, 6), torch.full((3,), 4), torch.randn(3, 5))
    return SD3Backbone(model.eval()), cond, (4, 8)


def z_image() -> Case:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=6,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 16, 16],
    )
    cond = Conditioning(torch.randn(3, 5, 6), torch.tensor([5, 1, 3]))
    return ZImageBackbone(model.eval()), cond, (4, 8)


def wan() -> Case:
    """Two frames of latents, one below the other."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        ffn_dim=16,
        text_dim=6,
        freq_dim=8,
        rope_max_seq_len=16,
    )
    cond = Conditioning(torch.randn(3, 5, 6), torch.tensor([5, 1, 3]))
    backbone = WanBackbone(model.eval())
    backbone.latent_frames = 2
    return backbone, cond, (8, 6)


def dit() -> Case:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    classes = torch.tensor([[0.0], [7.0], [10.0]])  # 10 is the null class
    cond = Conditioning(torch.zeros(3, 1, 1), torch.ones(3, dtype=torch.long), classes)
    return DiTBackbone(model.eval()), cond, (8, 8)


def documented() -> Case:
    """The worked example of docs/bring-your-own-teacher.md."""
    from bria_family import tiny

    return tiny.case()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--backbone")
    cases = (
        [_import(named)]
        if named
        else [
            flux,
            flux_kontext,
            one_pixel,
            flux2,
            qwen_image,
            qwen_image_edit,
            sd3,
            wan,
            dit,
            documented,
        ]
    )
    metafunc.parametrize("make", cases, ids=[case.__name__ for case in cases])


def _import(name: str) -> Callable[[], Case]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise pytest.UsageError(f"--backbone: expected module:function, got {name!r}")
    case: Callable[[], Case] = getattr(importlib.import_module(module), function)
    return case
