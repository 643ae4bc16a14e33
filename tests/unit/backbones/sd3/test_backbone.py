from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from piflow.backbones import Conditioning, SD3Backbone

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 8,
}
VERSIONS: dict[str, dict[str, Any]] = {
    "3": {},
    "3.5-large": {"qk_norm": "rms_norm"},
    "3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def random_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{**CONFIG, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def x() -> Any:
    return torch.randn(3, 4, 4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cond() -> Conditioning:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, 7, 6, generator=generator)
    return Conditioning(tokens, torch.full((3,), 7), torch.randn(3, 5, generator=generator))


def pipeline_prediction(model: Any, x: Any, sigma: float, cond: Conditioning, **call: Any) -> Any:
    """The velocity behind one Euler step of the real pipeline from `sigma` to 0."""
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    end = pipeline(
        prompt_embeds=cond.tokens,
        pooled_prompt_embeds=cond.pooled,
        latents=x,
        height=x.shape[2] * pipeline.vae_scale_factor,
        width=x.shape[3] * pipeline.vae_scale_factor,
        sigmas=[sigma],
        output_type="latent",
        **{"guidance_scale": 1.0, **call},
    ).images
    return (x - end) / sigma


@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("version", VERSIONS)
def test_velocity_is_the_pipelines(
    version: str, sigma: float, x: torch.Tensor, cond: Conditioning
) -> None:
    """Packing, positions, time, text and unpacking, through the pipeline's own call."""
    model = random_model(**VERSIONS[version])
    expected = pipeline_prediction(model, x, sigma, cond)
    assert expected.std() > 0.1
    velocity = SD3Backbone(model).teacher_velocity(x, torch.full((3,), sigma), cond)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    again = pipeline_prediction(model, x, sigma, cond)  # the model wasn't taken apart
    assert torch.equal(again, expected)


def test_guided_velocity_is_the_pipelines(x: torch.Tensor, cond: Conditioning) -> None:
    from piflow.guidance import guided_velocity

    model = random_model()
    other = Conditioning(cond.tokens.flip(0), cond.num_tokens, cond.pooled)
    expected = pipeline_prediction(
        model, x, 0.6, cond, guidance_scale=3.5,
        negative_prompt_embeds=other.tokens, negative_pooled_prompt_embeds=other.pooled,
    )  # fmt: skip
    backbone, sigma = SD3Backbone(model), torch.full((3,), 0.6)
    positive, negative = (backbone.teacher_velocity(x, sigma, part) for part in (cond, other))
    found = guided_velocity(positive, negative, 3.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(2, 16), (16, 2), (16, 16), (6, 4)])
def test_any_size_up_to_the_tables(height: int, width: int, cond: Conditioning) -> None:
    model = random_model()
    x = torch.randn(3, 4, height, width, generator=torch.Generator().manual_seed(3))
    velocity = SD3Backbone(model).teacher_velocity(x, torch.full((3,), 0.7), cond)
    expected = pipeline_prediction(model, x, 0.7, cond)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "parameters", "width"),
    [
        # Stable Diffusion 3.5 large and medium, as their config.json say
        (
            {
                "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                "pos_embed_max_size": 192, "qk_norm": "rms_norm",
            },
            8_056_627_520, 2432,
        ),
        (
            {
                "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                "dual_attention_layers": tuple(range(13)),
            },
            2_243_171_520, 1536,
        ),
    ],
    ids=["3.5-large", "3.5-medium"],
)  # fmt: skip
def test_full_size(changes: dict[str, Any], parameters: int, width: int) -> None:
    """Without the weights."""
    with torch.device("meta"):
        backbone = SD3Backbone(SD3Transformer2DModel(**changes))
    assert sum(p.numel() for p in backbone.module.parameters()) == parameters
    assert (backbone.width, backbone.latent_channels) == (width, 16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 4, "expected patch_size 2 and a pos_embed_max_size, got 4 and 8"),
        ("pos_embed_max_size", None, "got 2 and None"),
        ("out_channels", 8, r"out_channels = in_channels = 4 \(a velocity\), got 8"),
    ],
)
def test_other_layouts(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Backbone(SD3Transformer2DModel(**{**CONFIG, field: value}))


def test_inputs_that_do_not_fit(x: torch.Tensor, cond: Conditioning) -> None:
    sigma = torch.full((3,), 0.6)
    with pytest.raises(ValueError, match="this SD3Transformer2DModel takes none"):
        SD3Backbone(random_model(), embedded_guidance=3.5)
    backbone = SD3Backbone(random_model())
    with pytest.raises(ValueError, match="even and at most 16 for this model, got 4×18"):
        backbone(torch.zeros(3, 4, 4, 18), sigma, cond)
    with pytest.raises(ValueError, match="even and at most 16 for this model, got 3×4"):
        backbone(x[:, :, :3, :4], sigma, cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        backbone(x, sigma, Conditioning(torch.zeros(3, 4, 7), cond.num_tokens, cond.pooled))
    with pytest.raises(ValueError, match="pooled vector of width 5, got none"):
        backbone(x, sigma, Conditioning(cond.tokens, cond.num_tokens))
