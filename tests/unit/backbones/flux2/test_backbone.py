from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

from piflow.backbones import Conditioning, Flux2Backbone
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, PolicyConfig
from piflow.roles import lora
from piflow.roles.heads import GMHead, PolicyClock, build_head

CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "timestep_guidance_channels": 8,
    "axes_dims_rope": (2, 2, 2, 2),
}


def random_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**{**CONFIG, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def x() -> Any:
    return torch.randn(3, 4, 4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cond() -> Conditioning:
    tokens = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2))
    return Conditioning(tokens, torch.full((3,), 7))


def pipeline_prediction(model: Any, x: Any, sigma: float, cond: Any, guidance: float) -> Any:
    """The velocity behind one Euler step of the real pipeline from `sigma` to 0."""
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    scale = pipeline.vae_scale_factor
    patches = Flux2Pipeline._patchify_latents(x)
    end = pipeline(
        prompt_embeds=cond.tokens,
        latents=patches,
        height=x.shape[2] * scale,
        width=x.shape[3] * scale,
        sigmas=[sigma],
        guidance_scale=guidance,
        output_type="latent",
    ).images
    ids = Flux2Pipeline._prepare_latent_ids(patches)
    whole = Flux2Pipeline._unpatchify_latents(Flux2Pipeline._unpack_latents_with_ids(end, ids))
    return (x - whole) / sigma


@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("embedded", [None, 4.0])
def test_velocity_is_the_pipelines(
    x: torch.Tensor, cond: Conditioning, sigma: float, embedded: float | None
) -> None:
    """Packing, positions, time, guidance and unpacking, through the pipeline's own call."""
    model = random_model(guidance_embeds=embedded is not None)
    velocity = Flux2Backbone(model, embedded_guidance=embedded).teacher_velocity(
        x, torch.full((3,), sigma), cond
    )
    expected = pipeline_prediction(model, x, sigma, cond, guidance=embedded or 1.0)
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_full_size() -> None:
    """FLUX.2-dev itself, without its weights: its LoRA is in every block."""
    with torch.device("meta"):
        backbone = Flux2Backbone(Flux2Transformer2DModel(), embedded_guidance=4.0)
    assert sum(p.numel() for p in backbone.module.parameters()) == 32_223_281_152
    assert (backbone.width, backbone.latent_channels) == (6144, 32)
    names = lora.resolve_targets(
        backbone.module, backbone.default_lora_targets, skip=backbone.output_names
    )
    assert len(names) == 8 * 4 + 48 * 2 + 2


@pytest.mark.parametrize("policy", [GMFlowPolicyConfig(num_gaussians=2), DXPolicyConfig()])
def test_heads_start_from_a_projection_without_a_bias(policy: PolicyConfig) -> None:
    output = Flux2Backbone(random_model(guidance_embeds=False)).output_layer()
    assert output.projection.bias is None
    clock, generator = PolicyClock(0.3, 3.2), torch.Generator()
    head = build_head(output, policy, clock, generator=generator, bias_noise=0.0)
    first = head.proj_out_means if isinstance(head, GMHead) else head.proj_out
    assert not first.bias.any()
    assert torch.equal(first.weight[:16], output.projection.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, "expected patch_size 1"),
        ({"out_channels": 32}, "tokens of 16 features out as in"),
        ({"axes_dims_rope": (2, 2, 4)}, r"of four axes .*, got \[2, 2, 4\]"),
        ({"guidance_embeds": True}, "set guidance.embedded"),
    ],
)
def test_other_layouts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flux2Backbone(Flux2Transformer2DModel(**{**CONFIG, "guidance_embeds": False, **changes}))


def test_inputs_that_do_not_fit(x: torch.Tensor, cond: Conditioning) -> None:
    backbone = Flux2Backbone(random_model(guidance_embeds=False))
    sigma = torch.full((3,), 0.6)
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, H, W\)"):
        backbone(x[:, :3], sigma, cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        backbone(x, sigma, Conditioning(torch.zeros(3, 4, 7), cond.num_tokens))
