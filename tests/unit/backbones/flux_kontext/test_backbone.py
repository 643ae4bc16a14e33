"""FLUX.1-Kontext against diffusers' own `FluxKontextPipeline`: the velocity with a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor

from piflow.backbones import Conditioning, FluxBackbone, FluxKontextBackbone, build_codec
from piflow.backbones.base import unpack
from piflow.backbones.encoders import build_encoder
from piflow.backbones.flux import FluxEncoderConfig
from piflow.backbones.flux_kontext import FAMILY
from piflow.config import ModelConfig
from piflow.testing.models import save_model

MAX_TOKENS = 12
SIZE = (16, 24)
PROMPTS = ["make the heart blue", "at night"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kontext")
    model = ModelConfig(family="flux_kontext", path=str(path / "transformer"), codec="vae")
    encoder = FluxEncoderConfig(path=str(path), max_tokens=MAX_TOKENS)
    save_model(path, model, encoder, size=16, guidance_embeds=True)
    return path


def test_sizes_are_the_pipelines() -> None:
    assert FAMILY.edits is not None
    assert [(width, height) for height, width in FAMILY.edits.sizes] == [
        *PREFERRED_KONTEXT_RESOLUTIONS
    ]
    for height, width in ((300, 500), (2000, 1999), (100, 900), (1, 1)):
        ratio = width / height
        nearest = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert FAMILY.edits.of(height, width) == (nearest[2], nearest[1])


def test_velocity_is_the_pipelines_at_every_step(folder: Path) -> None:
    """Two prompts at once, with pictures of another size than what is made of them."""
    pipe = FluxKontextPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    calls: list[tuple[dict[str, Any], Tensor]] = []
    pipe.transformer.register_forward_hook(
        lambda module, args, named, out: calls.append((named, out[0])), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(0, 256, (2, 3, 12, 8), generator=generator)
    pipe(
        levels / 255, PROMPTS, height=SIZE[0], width=SIZE[1], max_area=SIZE[0] * SIZE[1],
        num_inference_steps=2, guidance_scale=2.5, max_sequence_length=MAX_TOKENS,
        generator=generator, output_type="latent", _auto_resize=False,
    )  # fmt: skip
    model = ModelConfig(family="flux_kontext", path=str(folder / "transformer"), codec="vae")
    backbone = FluxKontextBackbone.load(folder / "transformer", embedded_guidance=2.5)
    encoder = build_encoder(FluxEncoderConfig(path=str(folder), max_tokens=MAX_TOKENS))
    encoded = encoder.encode(PROMPTS)
    cond = Conditioning(
        torch.stack([prompt.tokens for prompt in encoded]),
        torch.full((2,), MAX_TOKENS),
        torch.stack([prompt.pooled for prompt in encoded if prompt.pooled is not None]),
        condition=build_codec(model).encode(levels / 127.5 - 1),
    )
    height, width = SIZE[0] // 2, SIZE[1] // 2
    noisy = height * width // 4
    assert len(calls) == 2
    for named, out in calls:
        x = unpack(named["hidden_states"][:, :noisy], height, width)
        found = backbone.teacher_velocity(x, named["timestep"], cond)
        expected = unpack(out[:, :noisy], height, width)
        assert out.shape[1] == noisy + 6 and expected.std() > 0.05
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    other = cond.editing(cond.condition.flip(0))  # type: ignore[union-attr]
    assert (backbone.teacher_velocity(x, named["timestep"], other) - found).abs().max() > 1e-3


def test_pictures_are_for_models_that_edit(folder: Path) -> None:
    x, sigma = torch.zeros(1, 4, 4, 4), torch.ones(1)
    cond = Conditioning(torch.zeros(1, 3, 16), torch.full((1,), 3), torch.zeros(1, 16))
    kontext = FluxKontextBackbone.load(folder / "transformer", embedded_guidance=2.5)
    with pytest.raises(ValueError, match="edits a picture, and the conditioning brings none"):
        kontext(x, sigma, cond)
    with pytest.raises(ValueError, match=r"must be \(B, 4, h, w\) for this model, got \(1, 3"):
        kontext(x, sigma, cond.editing(torch.zeros(1, 3, 4, 4)))
    flux = FluxBackbone.load(folder / "transformer", embedded_guidance=2.5)
    with pytest.raises(ValueError, match="pictures of prompts alone.*leave them out"):
        flux(x, sigma, cond.editing(x))
