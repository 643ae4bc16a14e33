"""FLUX.2-klein against diffusers' own `Flux2KleinPipeline`: text encoder and velocity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

from piflow.backbones import Conditioning, Flux2Backbone
from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.flux2_klein import FAMILY, Flux2KleinEncoderConfig
from piflow.config import ModelConfig
from piflow.testing.models import save_model

PROMPTS = ["a red heart", "", "a red heart that is longer than what fits", "{}"]
MAX_TOKENS = 24


def _config(folder: Path) -> Flux2KleinEncoderConfig:
    return Flux2KleinEncoderConfig(path=str(folder), max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("klein")
    model = ModelConfig(family="flux2_klein", path=str(path / "transformer"), codec="vae")
    save_model(path, model, _config(path), size=16)
    return path


def test_it_gives_what_the_pipeline_gives(folder: Path) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(str(folder), local_files_only=True)
    with torch.no_grad():
        tokens, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=MAX_TOKENS)
    encoder = build_encoder(_config(folder))
    assert tokens.shape == (4, MAX_TOKENS, encoder.identity.hidden_size)
    encoded = encoder.encode(PROMPTS, 3)
    for row, prompt in enumerate(encoded):
        assert prompt.pooled is None
        torch.testing.assert_close(prompt.tokens, tokens[row], rtol=0, atol=1e-5)
    assert [prompt.truncated for prompt in encoded] == [False, False, True, False]
    distances = torch.cdist(tokens.flatten(1), tokens.flatten(1)) + torch.eye(len(PROMPTS))
    assert (distances > 0.01).all()  # the prompts do differ: the comparison says something


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_velocity_is_the_pipelines(folder: Path, sigma: float) -> None:
    """One Euler step of the real pipeline from `sigma` to 0."""
    model = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    pipeline = Flux2KleinPipeline.from_pretrained(
        str(folder), local_files_only=True, transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.bn.running_mean.zero_()  # latents come out as the loop has them
    pipeline.vae.bn.running_var.fill_(1 - pipeline.vae.config.batch_norm_eps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 4, 10, generator=generator)
    tokens = torch.randn(3, 7, 48, generator=generator)
    end = pipeline(
        prompt_embeds=tokens,
        latents=Flux2KleinPipeline._patchify_latents(x),
        height=x.shape[2] * pipeline.vae_scale_factor,
        width=x.shape[3] * pipeline.vae_scale_factor,
        sigmas=[sigma],
        guidance_scale=1.0,
        output_type="latent",
    ).images
    cond = Conditioning(tokens, torch.full((3,), 7))
    velocity = Flux2Backbone(model).teacher_velocity(x, torch.full((3,), sigma), cond)
    torch.testing.assert_close(velocity, (x - end) / sigma, atol=1e-5, rtol=0)


def test_the_identity_names_the_layers(folder: Path) -> None:
    identity = encoder_identity(_config(folder))
    assert identity.name == "qwen3-28x16, layers 9+18+27"
    assert (identity.max_tokens, identity.hidden_size) == (MAX_TOKENS, 48)
    config = folder / "text_encoder" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"num_hidden_layers": 20}))
    with pytest.raises(ValueError, match="has 20 layers, the family takes the states after layers"):
        encoder_identity(_config(folder))
    config.write_text(whole)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, 3_875_544_576),
        (
            {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
             "joint_attention_dim": 12288},
            9_078_581_248,
        ),
    ],
    ids=["4B", "9B"],
)  # fmt: skip
def test_full_size(config: dict[str, int], parameters: int) -> None:
    """Without weights."""
    assert FAMILY.published is not None
    backbone = Flux2Backbone.on_meta({**FAMILY.published.config, **config})
    assert sum(p.numel() for p in backbone.module.parameters()) == parameters
