from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from piflow.backbones import FluxBackbone, load_backbone
from piflow.backbones.base import pack
from piflow.backbones.flux.backbone import image_ids
from piflow.config import ModelConfig


def pipeline_prediction(model: Any, x: Any, sigma: float, cond: Any, guidance: float) -> Any:
    """The velocity behind one Euler step of the real pipeline from `sigma` to 0."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, height, width = x.shape
    scale = pipeline.vae_scale_factor
    end = pipeline(
        prompt_embeds=cond.tokens,
        pooled_prompt_embeds=cond.pooled,
        latents=FluxPipeline._pack_latents(x, batch, channels, height, width),
        height=height * scale,
        width=width * scale,
        sigmas=[sigma],
        guidance_scale=guidance,
        output_type="latent",
    ).images
    return (x - FluxPipeline._unpack_latents(end, height * scale, width * scale, scale)) / sigma


@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("embedded", [None, 3.5])
def test_velocity_is_the_pipelines(
    flux_config: dict[str, Any], flux_inputs: Any, sigma: float, embedded: float | None
) -> None:
    """Packing, positions, time, guidance and unpacking, through the pipeline's own call."""
    x, _, cond = flux_inputs
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**flux_config, guidance_embeds=embedded is not None).eval()
    velocity = FluxBackbone(model, embedded_guidance=embedded).teacher_velocity(
        x, torch.full((3,), sigma), cond
    )
    expected = pipeline_prediction(model, x, sigma, cond, guidance=embedded or 1.0)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_packing_is_diffusers_own() -> None:
    latents = torch.randn(2, 12, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 12, 6, 10))


def test_image_ids_are_diffusers_own() -> None:
    cpu = torch.device("cpu")
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, cpu, torch.float32)
    assert torch.equal(image_ids(6, 10, cpu), expected)


def test_each_sample_has_its_own_time(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = FluxBackbone.load(flux_folder)
    whole = backbone.teacher_velocity(x, sigma, cond)
    assert not whole.requires_grad and backbone(x, sigma, cond).requires_grad
    last = backbone.teacher_velocity(x, sigma[2].expand(3), cond)
    torch.testing.assert_close(last[2], whole[2], atol=1e-5, rtol=0)
    assert not torch.allclose(last[0], whole[0])


def test_full_size() -> None:
    """FLUX.1-dev itself, without its weights."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    backbone = FluxBackbone(model, embedded_guidance=3.5)
    assert sum(p.numel() for p in backbone.module.parameters()) == 11_901_408_320
    assert (backbone.width, backbone.latent_channels) == (3072, 16)


def test_latent_channels_come_from_the_config(flux_folder: Path) -> None:
    assert FluxBackbone.load(flux_folder).latent_channels == 12


def test_recipe_dtype(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = load_backbone(ModelConfig(path=str(flux_folder), dtype="bfloat16"))
    assert {p.dtype for p in backbone.module.parameters()} == {torch.bfloat16}
    velocity = backbone.teacher_velocity(x, sigma, cond)
    assert velocity.dtype == torch.float32
    full = FluxBackbone.load(flux_folder).teacher_velocity(x, sigma, cond)
    torch.testing.assert_close(velocity, full, atol=0.1, rtol=0)


def test_embedded_guidance_must_fit(flux_folder: Path, flux_config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="set guidance.embedded"):
        FluxBackbone(FluxTransformer2DModel(**flux_config, guidance_embeds=True))
    with pytest.raises(ValueError, match="this FLUX transformer takes none"):
        FluxBackbone.load(flux_folder, embedded_guidance=3.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 2, "expected patch_size 1"),
        ("in_channels", 6, "in_channels to be a multiple of 4"),
        ("out_channels", 16, "tokens of 48 features out as in"),
    ],
)
def test_other_layouts(flux_config: dict[str, Any], field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FluxBackbone(FluxTransformer2DModel(**{**flux_config, field: value}))


def test_another_class() -> None:
    with pytest.raises(ValueError, match="expected a FluxTransformer2DModel, got Linear"):
        FluxBackbone(torch.nn.Linear(1, 1))


def test_inputs_that_do_not_fit(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = FluxBackbone.load(flux_folder)
    with pytest.raises(ValueError, match=r"latents must be \(B, 12, H, W\)"):
        backbone(x[:, :4], sigma, cond)
    with pytest.raises(ValueError, match="must be even, got 3×8"):
        backbone(x[:, :, :3], sigma, cond)
    with pytest.raises(ValueError, match="one sigma and one prompt a sample"):
        backbone(x, sigma[:2], cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        wide = torch.zeros(3, 4, 7)
        backbone(x, sigma, type(cond)(wide, cond.num_tokens, cond.pooled))
    with pytest.raises(ValueError, match="pooled vector of width 5, got none"):
        backbone(x, sigma, type(cond)(cond.tokens, cond.num_tokens, None))
