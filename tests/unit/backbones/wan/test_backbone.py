"""Wan's transformer against diffusers' own `WanPipeline`, and the layout of its latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from piflow.backbones import Conditioning, WanBackbone
from piflow.backbones.wan import FAMILY
from piflow.config import ModelConfig
from piflow.planning.model import _known_model

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 16,
    "text_dim": 6,
    "freq_dim": 8,
    "rope_max_seq_len": 16,
}
FRAMES = 3


def made(**changed: Any) -> Any:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**CONFIG, **changed}).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


@pytest.fixture
def backbone(model: Any) -> WanBackbone:
    backbone = WanBackbone(model)
    backbone.latent_frames = FRAMES
    return backbone


@pytest.fixture(scope="module")
def video() -> Any:
    """Latents of two videos as the pipeline has them, (B, C, F, h, w), of unequal sizes."""
    return torch.randn(2, 4, FRAMES, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cond() -> Conditioning:
    """Prompts of 5 and 2 tokens, zeros behind them, which the model attends to."""
    tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    tokens[1, 2:] = 0
    return Conditioning(tokens, torch.tensor([5, 2]))


def pipeline_prediction(model: Any, video: Any, sigma: float, cond: Conditioning) -> Any:
    """The velocity behind one Euler step of the real pipeline from `sigma` to 0."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda count, device=None: plain(device=device, sigmas=[sigma])
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model
    )
    pipeline.set_progress_bar_config(disable=True)
    end = pipeline(
        prompt_embeds=cond.tokens,
        latents=video,
        height=32,
        width=48,
        num_frames=4 * (FRAMES - 1) + 1,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    return (video - end) / sigma


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_velocity_is_the_pipelines(
    model: Any, backbone: WanBackbone, video: Any, cond: Conditioning, sigma: float
) -> None:
    """Sign, time, packing, positions and text, through the pipeline's own call."""
    x = video.flatten(2, 3)
    velocity = backbone.teacher_velocity(x, torch.full((2,), sigma), cond)
    expected = pipeline_prediction(model, video, sigma, cond).flatten(2, 3)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    backbone.latent_frames = 1
    tall = backbone.teacher_velocity(x, torch.full((2,), sigma), cond)
    assert (tall - expected).abs().max() > 1e-3, "frames have positions of their own"


def test_the_diffusers_model_is_left_as_it_is(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = WanBackbone(model)
    backbone.install_output(torch.nn.Identity())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_dx_head_is_stored_as_the_class_has_its_output_layer(
    model: Any, backbone: WanBackbone
) -> None:
    output = backbone.output_layer()
    named = {
        **{f"norm_out.{name}": value for name, value in output.norm.named_parameters()},
        **{f"proj_out.{name}": value for name, value in output.projection.named_parameters()},
    }
    stored = backbone.stored_head(named)
    expected = model.state_dict()
    assert stored.keys() == {"scale_shift_table", "proj_out.weight", "proj_out.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    again = backbone.read_head(stored)
    assert again.keys() == named.keys()
    assert all(torch.equal(value, named[name]) for name, value in again.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_size": (2, 2, 2)}, r"expected patch_size \[1, 2, 2\].*got \[2, 2, 2\]"),
        ({"added_kv_proj_dim": 4}, r"got added_kv_proj_dim = 4 \(image to video\)"),
        ({"in_channels": 8}, "expected out_channels = in_channels = 8"),
    ],
)
def test_other_variants(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanBackbone(made(**changed))


def test_inputs_that_do_not_fit(backbone: WanBackbone, cond: Conditioning) -> None:
    sigma = torch.full((2,), 0.6)
    with pytest.raises(ValueError, match=r"latents of 8×6 aren't 3 frames of even height"):
        backbone(torch.zeros(2, 4, 8, 6), sigma, cond)
    with pytest.raises(ValueError, match=r"16 positions each way, and a video of \(3, 1, 17\)"):
        backbone(torch.zeros(2, 4, 6, 34), sigma, cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        backbone(torch.zeros(2, 4, 12, 6), sigma, Conditioning(torch.zeros(2, 5, 7), sigma))
    with pytest.raises(ValueError, match="takes none"):
        WanBackbone(made(), embedded_guidance=4.0)


@pytest.mark.parametrize(
    ("folder", "parameters", "blocks"),
    [
        ("Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800, 30),
        ("Wan2.1-T2V-14B-Diffusers", 14_288_491_584, 40),
    ],
)
def test_the_published_sizes(folder: str, parameters: int, blocks: int) -> None:
    """A recipe's folder that isn't there is planned as the model of its name."""
    models = (FAMILY.published, *FAMILY.others)
    known = _known_model(models, f"models/{folder}/transformer")
    assert known is not None and known.repository == f"Wan-AI/{folder}"
    backbone = WanBackbone.on_meta(known.config)
    assert sum(p.numel() for p in backbone.module.parameters()) == parameters
    found = [m for m in backbone.module.modules() if isinstance(m, backbone.block_classes)]
    assert len(found) == blocks
    assert _known_model(models, "somewhere/else") is FAMILY.published


def test_the_published_length() -> None:
    assert ModelConfig(family="wan", path="x", codec="vae").latent_frames == 21
