from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from piflow.backbones import Conditioning, ZImageBackbone
from piflow.config import GMFlowPolicyConfig
from piflow.roles.heads import build_head, time_width

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "dim": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 6,
    "axes_dims": [2, 2, 4],
    "axes_lens": [256, 16, 16],
}


def made(std: float = 0.15, **changed: Any) -> Any:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**{**CONFIG, **changed}).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std if "token" not in name else 1.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


@pytest.fixture
def backbone(model: Any) -> ZImageBackbone:
    return ZImageBackbone(model)


@pytest.fixture(scope="module")
def x() -> Any:
    """10 tokens a picture: the model pads them to 32."""
    return torch.randn(3, 4, 4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cond() -> Conditioning:
    """Prompts of 5, 33 and 32 tokens, which the model pads to 32, 64 and 32."""
    generator = torch.Generator().manual_seed(2)
    num_tokens = torch.tensor([5, 33, 32])
    states = torch.randn(3, 40, 6, generator=generator)
    valid = torch.arange(40) < num_tokens[:, None]
    return Conditioning(states * valid[..., None], num_tokens)


def pipeline_prediction(model: Any, x: Any, sigma: float, cond: Conditioning) -> Any:
    """The velocity behind one Euler step of the real pipeline from `sigma` to 0."""
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    scale = pipeline.vae_scale_factor
    counts = cond.num_tokens.tolist()
    end = pipeline(
        prompt_embeds=[row[:count] for row, count in zip(cond.tokens, counts, strict=True)],
        latents=x,
        height=x.shape[2] * scale,
        width=x.shape[3] * scale,
        sigmas=[sigma],
        guidance_scale=0.0,
        output_type="latent",
    ).images
    return (x - end) / sigma


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_velocity_is_the_pipelines(
    model: Any, backbone: ZImageBackbone, x: Any, cond: Conditioning, sigma: float
) -> None:
    """Sign, time, packing, positions, padding and mask, through the pipeline's own call."""
    velocity = backbone.teacher_velocity(x, torch.full((3,), sigma), cond)
    expected = pipeline_prediction(model, x, sigma, cond)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    other_time = backbone.teacher_velocity(x, torch.full((3,), 1 - sigma), cond)
    assert (other_time - expected).abs().max() > 1e-3


def test_full_prompts_are_the_pipelines_maskless_call(
    model: Any, backbone: ZImageBackbone, x: Any, cond: Conditioning
) -> None:
    full = Conditioning(cond.tokens[:, :3], torch.full((3,), 3), full=True)
    velocity = backbone.teacher_velocity(x, torch.full((3,), 0.6), full)
    expected = pipeline_prediction(model, x, 0.6, full)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_padding_is_not_seen(backbone: ZImageBackbone, x: Any, cond: Conditioning) -> None:
    """Neither its content nor its length; and a prompt's own tokens are."""
    sigma = torch.tensor([1.0, 0.6, 0.2])
    whole = backbone.teacher_velocity(x, sigma, cond)
    valid = (torch.arange(40) < cond.num_tokens[:, None])[..., None]
    noisy = Conditioning(torch.where(valid, cond.tokens, 50.0), cond.num_tokens)
    assert torch.equal(backbone.teacher_velocity(x, sigma, noisy), whole)
    for i, length in enumerate(cond.num_tokens.tolist()):
        alone = Conditioning(cond.tokens[i : i + 1, :length], cond.num_tokens[i : i + 1])
        velocity = backbone.teacher_velocity(x[i : i + 1], sigma[i : i + 1], alone)
        torch.testing.assert_close(velocity, whole[i : i + 1], atol=1e-5, rtol=0)
    shorter = Conditioning(cond.tokens, cond.num_tokens - 1)
    difference = (backbone.teacher_velocity(x, sigma, shorter) - whole).abs().amax(dim=(1, 2, 3))
    assert (difference > 1e-3).all()
    none = Conditioning(cond.tokens, torch.zeros_like(cond.num_tokens))
    assert backbone.teacher_velocity(x, sigma, none).isfinite().all()


def test_a_head_takes_the_narrow_time_embedding(x: Any, cond: Conditioning) -> None:
    """Z-Image's has 256 features, its hidden states 3840."""
    backbone = ZImageBackbone(made(0.03, dim=288, axes_dims=[48, 48, 48]))
    output = backbone.output_layer()
    assert (backbone.width, time_width(output)) == (288, 256)
    policy = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
    head = build_head(output, policy, None, generator=torch.Generator(), bias_noise=0.0)
    sigma = torch.full((3,), 0.6)
    expected = backbone.teacher_velocity(x, sigma, cond)
    backbone.install_output(head)
    tokens = backbone.output_tokens(x, sigma, cond)
    found = head.policy(tokens, backbone.unpack, x, sigma).velocity(x, sigma)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_diffusers_model_is_left_as_it_is(model: Any, x: Any, cond: Conditioning) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = ZImageBackbone(model)
    backbone.install_output(torch.nn.Identity())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, r"got \[2, 4\] and \[1, 1\]"),
        ({"siglip_feat_dim": 8}, r"got siglip_feat_dim = 8 \(editing\)"),
        ({"n_kv_heads": 1}, "expected n_kv_heads = n_heads = 2, got 1"),
    ],
)
def test_other_variants(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZImageBackbone(made(**changed))


def test_embedded_guidance_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="takes none"):
        ZImageBackbone(model, embedded_guidance=4.0)


def test_inputs_that_do_not_fit(backbone: ZImageBackbone, x: Any, cond: Conditioning) -> None:
    sigma = torch.full((3,), 0.6)
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, H, W\)"):
        backbone(x[:, None], sigma, cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        backbone(x, sigma, Conditioning(torch.zeros(3, 4, 7), cond.num_tokens))
    with pytest.raises(ValueError, match=r"positions \(text, rows, columns\), 40 text tokens and"):
        backbone(torch.zeros(3, 4, 4, 40), sigma, cond)
