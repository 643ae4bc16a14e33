from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from piflow.backbones import FluxBackbone, load_backbone
from piflow.backbones.flux import image_ids, pack, unpack
from piflow.config import ModelConfig


def test_packing_is_diffusers_own() -> None:
    latents = torch.randn(2, 12, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 12, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), latents)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 6, 10, 1), latents)


def test_image_ids_are_diffusers_own() -> None:
    cpu = torch.device("cpu")
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, cpu, torch.float32)
    assert torch.equal(image_ids(6, 10, cpu), expected)


def test_odd_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="must be even, got 5×6"):
        pack(torch.zeros(1, 12, 5, 6))


def test_call_equals_the_model_called_by_hand(flux_folder: Path, flux_inputs: Any) -> None:
    """timestep = sigma, pipeline ids, and the same tokens back as latents."""
    x, sigma, cond = flux_inputs
    backbone = FluxBackbone.load(flux_folder)
    model = FluxTransformer2DModel.from_pretrained(str(flux_folder))
    cpu = torch.device("cpu")
    with torch.no_grad():
        tokens = model(
            hidden_states=FluxPipeline._pack_latents(x, 3, 12, 4, 8),
            timestep=sigma,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 2, 4, cpu, torch.float32),
            txt_ids=torch.zeros(4, 3),
        ).sample
    expected = FluxPipeline._unpack_latents(tokens, 4, 8, 1)
    assert torch.equal(backbone.teacher_velocity(x, sigma, cond), expected)
    assert not backbone.teacher_velocity(x, sigma, cond).requires_grad
    assert backbone(x, sigma, cond).requires_grad


def test_latent_channels_come_from_the_config(flux_folder: Path) -> None:
    assert FluxBackbone.load(flux_folder).latent_channels == 12


def test_a_sample_does_not_depend_on_its_batch(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = FluxBackbone.load(flux_folder)
    whole = backbone.teacher_velocity(x, sigma, cond)
    for i in range(3):
        alone = backbone.teacher_velocity(x[i : i + 1], sigma[i : i + 1], cond.slice(i, i + 1))
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-5, rtol=0)


def test_recipe_dtype(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = load_backbone(ModelConfig(path=str(flux_folder), dtype="bfloat16"))
    assert {p.dtype for p in backbone.module.parameters()} == {torch.bfloat16}
    velocity = backbone.teacher_velocity(x, sigma, cond)
    assert velocity.dtype == torch.float32
    full = FluxBackbone.load(flux_folder).teacher_velocity(x, sigma, cond)
    torch.testing.assert_close(velocity, full, atol=0.1, rtol=0)


def test_embedded_guidance_reaches_the_model(flux_config: dict[str, Any], flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**flux_config, guidance_embeds=True)
    with pytest.raises(ValueError, match="set guidance.embedded"):
        FluxBackbone(model)
    low = FluxBackbone(model, embedded_guidance=1.0).teacher_velocity(x, sigma, cond)
    high = FluxBackbone(model, embedded_guidance=3.5).teacher_velocity(x, sigma, cond)
    assert not torch.allclose(low, high)


def test_embedded_guidance_for_a_model_without_it(flux_folder: Path) -> None:
    with pytest.raises(ValueError, match="this model takes none"):
        FluxBackbone.load(flux_folder, embedded_guidance=3.5)


def test_inputs_that_do_not_fit(flux_folder: Path, flux_inputs: Any) -> None:
    x, sigma, cond = flux_inputs
    backbone = FluxBackbone.load(flux_folder)
    with pytest.raises(ValueError, match=r"latents must be \(B, 12, H, W\)"):
        backbone(x[:, :4], sigma, cond)
    with pytest.raises(ValueError, match="one sigma and one prompt a sample"):
        backbone(x, sigma[:2], cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        wide = torch.zeros(3, 4, 7)
        backbone(x, sigma, type(cond)(wide, cond.num_tokens, cond.pooled))
    with pytest.raises(ValueError, match="pooled vector of width 5, got none"):
        backbone(x, sigma, type(cond)(cond.tokens, cond.num_tokens, None))


def test_folders_that_are_not_a_flux_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        FluxBackbone.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="config.json says 'UNet2DModel'"):
        FluxBackbone.load(tmp_path)


def test_missing_weights_are_not_made_up(flux_folder: Path, tmp_path: Path) -> None:
    """diffusers alone would go on with random ones."""
    folder = tmp_path / "incomplete"
    shutil.copytree(flux_folder, folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors .*\(proj_out.weight"):
        FluxBackbone.load(folder)
