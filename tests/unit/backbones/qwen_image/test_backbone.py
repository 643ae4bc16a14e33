from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from piflow.backbones import Conditioning, QwenImageBackbone

CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "axes_dims_rope": [2, 2, 4],
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**CONFIG).eval()


@pytest.fixture
def backbone(model: Any) -> QwenImageBackbone:
    return QwenImageBackbone(model)


@pytest.fixture(scope="module")
def x() -> Any:
    return torch.randn(3, 4, 4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cond() -> Conditioning:
    """Three prompts of 5, 2 and 3 tokens, padded to 7."""
    generator = torch.Generator().manual_seed(2)
    num_tokens = torch.tensor([5, 2, 3])
    states = torch.randn(3, 7, 6, generator=generator)
    valid = torch.arange(7) < num_tokens[:, None]
    return Conditioning(states * valid[..., None], num_tokens)


def pipeline_prediction(model: Any, x: Any, sigma: float, cond: Conditioning) -> Any:
    """The velocity behind one Euler step of the real pipeline from `sigma` to 0.

    Prompts are padded to the longest, as the pipeline's own encoder does.
    """
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, height, width = x.shape
    scale = pipeline.vae_scale_factor
    length = int(cond.num_tokens.max())
    end = pipeline(
        prompt_embeds=cond.tokens[:, :length],
        prompt_embeds_mask=(torch.arange(length) < cond.num_tokens[:, None]).long(),
        latents=QwenImagePipeline._pack_latents(x, batch, channels, height, width),
        height=height * scale,
        width=width * scale,
        sigmas=[sigma],
        true_cfg_scale=1.0,
        output_type="latent",
    ).images
    unpacked = QwenImagePipeline._unpack_latents(end, height * scale, width * scale, scale)
    return (x - unpacked[:, :, 0]) / sigma


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_velocity_is_the_pipelines(
    model: Any, backbone: QwenImageBackbone, x: Any, cond: Conditioning, sigma: float
) -> None:
    """Packing, positions, time, mask and unpacking, through the pipeline's own call."""
    velocity = backbone.teacher_velocity(x, torch.full((3,), sigma), cond)
    expected = pipeline_prediction(model, x, sigma, cond)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_full_prompts_are_the_pipelines_maskless_call(
    model: Any, backbone: QwenImageBackbone, x: Any, cond: Conditioning
) -> None:
    full = Conditioning(cond.tokens[:, :2], torch.full((3,), 2))
    velocity = backbone.teacher_velocity(x, torch.full((3,), 0.6), full)
    expected = pipeline_prediction(model, x, 0.6, full)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_padding_is_not_seen(backbone: QwenImageBackbone, x: Any, cond: Conditioning) -> None:
    """Neither its content nor its length; and a prompt's own tokens are."""
    sigma = torch.tensor([1.0, 0.6, 0.2])
    whole = backbone.teacher_velocity(x, sigma, cond)
    valid = (torch.arange(7) < cond.num_tokens[:, None])[..., None]
    noisy = Conditioning(torch.where(valid, cond.tokens, 50.0), cond.num_tokens)
    assert torch.equal(backbone.teacher_velocity(x, sigma, noisy), whole)
    for i, length in enumerate(cond.num_tokens.tolist()):
        alone = Conditioning(cond.tokens[i : i + 1, :length], cond.num_tokens[i : i + 1])
        velocity = backbone.teacher_velocity(x[i : i + 1], sigma[i : i + 1], alone)
        torch.testing.assert_close(velocity, whole[i : i + 1], atol=1e-5, rtol=0)
    shorter = Conditioning(cond.tokens, cond.num_tokens - 1)
    difference = (backbone.teacher_velocity(x, sigma, shorter) - whole).abs().amax(dim=(1, 2, 3))
    assert (difference > 1e-3).all()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_last_blocks_text_mlp_has_no_gradient_and_is_no_target(
    num_layers: int, x: Any, cond: Conditioning
) -> None:
    backbone = QwenImageBackbone(
        QwenImageTransformer2DModel(**{**CONFIG, "num_layers": num_layers})
    )
    backbone(x, torch.full((3,), 0.6), cond).sum().backward()
    mlps = {
        name.removesuffix(".weight"): parameter.grad is not None
        for name, parameter in backbone.module.named_parameters()
        if "txt_mlp" in name and name.endswith(".weight")
    }
    last = f"transformer_blocks.{num_layers - 1}."
    assert {name for name, reached in mlps.items() if not reached} == {
        name for name in mlps if name.startswith(last)
    }
    targets = {target for target in backbone.default_lora_targets if "txt_mlp" in target}
    assert targets == {name for name, reached in mlps.items() if reached}


def test_full_size() -> None:
    """Qwen-Image itself, without its weights: 20.43 B; text MLPs of blocks 0 to 58 of 60."""
    with torch.device("meta"):
        backbone = QwenImageBackbone(QwenImageTransformer2DModel())
    assert sum(p.numel() for p in backbone.module.parameters()) == 20_430_401_088
    assert (backbone.width, backbone.latent_channels) == (3072, 16)
    text = [target for target in backbone.default_lora_targets if "txt_mlp" in target]
    assert len(text) == 2 * 59 and len(backbone.default_lora_targets) == 2 * 59 + 4
    assert text[-1] == "transformer_blocks.58.txt_mlp.net.2"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("zero_cond_t", True, "got zero_cond_t = true"),
        ("use_layer3d_rope", True, "got use_layer3d_rope = true"),
        ("guidance_embeds", True, "has no embedding for a guidance"),
        ("out_channels", 8, "tokens of 16 features out as in"),
    ],
)
def test_other_variants(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenImageBackbone(QwenImageTransformer2DModel(**{**CONFIG, field: value}))


def test_embedded_guidance_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="takes none"):
        QwenImageBackbone(model, embedded_guidance=4.0)


def test_inputs_that_do_not_fit(backbone: QwenImageBackbone, x: Any, cond: Conditioning) -> None:
    sigma = torch.full((3,), 0.6)
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, H, W\)"):
        backbone(x[:, None], sigma, cond)
    with pytest.raises(ValueError, match="token states of width 6, got 7"):
        backbone(x, sigma, Conditioning(torch.zeros(3, 4, 7), cond.num_tokens))
