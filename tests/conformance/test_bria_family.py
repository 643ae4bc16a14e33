"""The guide's family against diffusers' own pipeline: prompts, packing, positions and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bria_family import BriaEncoderConfig

from piflow.backbones import load_backbone
from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.config import ModelConfig
from piflow.inference.settings import SamplingSettings, encode_prompts
from piflow.schedule import FewStep
from piflow.testing.models import save_model

SIZE, MAX_TOKENS = 16, 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SamplingSettings:
    folder = tmp_path_factory.mktemp("bria")
    model = ModelConfig(family="bria_family", path=str(folder / "transformer"), codec="vae")
    encoder = BriaEncoderConfig(path=str(folder), max_tokens=MAX_TOKENS)
    save_model(folder, model, encoder, size=SIZE)
    return SamplingSettings(
        model=model, encoder=encoder, height=SIZE, width=SIZE,
        few_step=FewStep(1, 1.0, 1.0, 8), embedded_guidance=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipe(settings: SamplingSettings) -> Any:
    from diffusers import BriaPipeline

    pipe = BriaPipeline.from_pretrained(Path(settings.model.path).parent, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_are_encoded_as_by_the_pipeline(settings: SamplingSettings, pipe: Any) -> None:
    prompts = ["red heart", "cat"]
    expected, unguided, _ = pipe.encode_prompt(prompts, max_sequence_length=MAX_TOKENS)
    found = encode_prompts(settings, [*prompts, ""])
    torch.testing.assert_close(found.tokens[:2], expected)
    assert torch.equal(found.tokens[2], unguided[0]), "without a negative prompt it is zeros"
    assert found.pooled is None


def test_settings_of_another_packages_family_are_read_again(settings: SamplingSettings) -> None:
    read = SamplingSettings.model_validate_json(settings.model_dump_json())
    assert read == settings and isinstance(read.encoder, BriaEncoderConfig)


def test_the_identity_needs_no_model(settings: SamplingSettings) -> None:
    identity = encoder_identity(settings.encoder)
    assert identity == build_encoder(settings.encoder).identity
    assert (identity.name, identity.max_tokens, identity.hidden_size) == ("bria-t5-1x16", 12, 16)


def test_one_step_of_the_pipeline_is_the_teachers(settings: SamplingSettings, pipe: Any) -> None:
    """From sigma = 1 to 0 a step takes the whole velocity."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(noise, 1, 4, 8, 8)
    latents = pipe(
        "red heart", height=SIZE, width=SIZE, num_inference_steps=1, guidance_scale=1.0,
        latents=packed, max_sequence_length=MAX_TOKENS, output_type="latent",
    ).images  # fmt: skip
    backbone = load_backbone(settings.model)
    cond = encode_prompts(settings, ["red heart"])
    velocity = backbone.teacher_velocity(noise, torch.ones(1), cond)
    expected = pipe._pack_latents(noise - velocity, 1, 4, 8, 8)
    torch.testing.assert_close(latents, expected)
    assert float(velocity.std()) > 0.01
