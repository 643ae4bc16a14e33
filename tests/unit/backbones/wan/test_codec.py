"""Videos and their latents: frames one below the other, by Wan's VAE and as pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones import PixelCodec, build_codec
from piflow.backbones.wan import tiny
from piflow.config import ModelConfig

FRAMES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wan-vae")
    torch.manual_seed(0)
    tiny.vae(16).save_pretrained(made / "vae")
    return made


def model_of(folder: Path, frames: int = FRAMES) -> ModelConfig:
    place = str(folder / "transformer")
    return ModelConfig(family="wan", path=place, codec="vae", frames=frames)


def test_latents_decode_as_in_the_pipeline(folder: Path) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline

    codec = build_codec(model_of(folder))
    assert codec.latent_shape(16, 24) == (4, 2 * 4, 6) and codec.frames == FRAMES
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    pipeline = WanPipeline(None, None, vae, None, None)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        z = latents.unflatten(2, (2, 4)) * std + mean
        expected = pipeline.video_processor.postprocess_video(vae.decode(z).sample, "pt")
    found = (codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    apart = found.unflatten(2, (FRAMES, 16)).movedim(2, 1)
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-5)


def test_videos_encode_to_the_same_layout(folder: Path) -> None:
    codec = build_codec(model_of(folder))
    video = torch.rand(1, 3, FRAMES * 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    first = build_codec(model_of(folder, 1)).encode(video[:, :, :16])
    latents = codec.encode(video)
    assert latents.shape == (1, *codec.latent_shape(16, 16))
    torch.testing.assert_close(latents[:, :, :4], first, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="with 5 frames one below the other, got"):
        codec.encode(video[:, :, :16])


def test_pixels_have_every_frame() -> None:
    codec = PixelCodec(frames=3)
    video = torch.rand(1, 3, 3 * 8, 12)
    latents = codec.encode(video)
    assert latents.shape == (1, *codec.latent_shape(8, 12)) == (1, 12, 12, 6)
    assert torch.equal(codec.decode(latents), video)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_residual": True}, r"is_residual = True \(Wan 2.2\)"),
        ({"temperal_downsample": [True, False]}, "of 4 frames, that of .* makes it of 2"),
        ({"_class_name": "AutoencoderKLQwenImage"}, "goes with a VAE of class AutoencoderKLWan"),
    ],
)
def test_other_vaes(changed: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        build_codec(model_of(copy))
