"""Codecs against the diffusers pipelines' own formulas, on tiny random VAEs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
)
from safetensors.torch import load_file, save_file

from piflow.backbones import Codec, PixelCodec, build_codec
from piflow.config import BUILT_IN, ModelConfig, find_family


def test_round_trip_is_exact() -> None:
    pictures = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = PixelCodec().encode(pictures)
    assert latents.shape == (2, *PixelCodec().latent_shape(8, 12))
    assert torch.equal(PixelCodec().decode(latents), pictures)


def test_channels_are_colour_major_then_position() -> None:
    """Channel 4c + 2i + j of a latent pixel is colour c at row i, column j of its 2×2 square."""
    pictures = torch.arange(3 * 4 * 4, dtype=torch.float32).reshape(1, 3, 4, 4)
    latents = PixelCodec().encode(pictures)
    for channel in range(12):
        colour, row, column = channel // 4, channel // 2 % 2, channel % 2
        assert latents[0, channel, 1, 0] == pictures[0, colour, 2 + row, column]


@pytest.mark.parametrize(("height", "width"), [(0, 8), (6, 8), (8, 7)])
def test_sizes_that_do_not_fit(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 4 pixels, got {height}×{width}"):
        PixelCodec().latent_shape(height, width)


def test_sizes_follow_the_familys_patch() -> None:
    assert PixelCodec(patch_size=1).latent_shape(6, 8) == (12, 3, 4)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 12×8"):
        PixelCodec(patch_size=4).latent_shape(12, 8)


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        PixelCodec().encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 12, h, w\), got \(1, 4, 8, 8\)"):
        PixelCodec().decode(torch.zeros(1, 4, 8, 8))


def test_recipe_names_the_codec() -> None:
    assert isinstance(build_codec(ModelConfig(path="x", codec="pixels")), PixelCodec)


# --------------------------------------------------------------------------------------------- VAE


def _pictures(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def _exact(vae: Any) -> Any:
    """A VAE whose posterior has no spread to speak of, so that drawing from it gives its mean."""
    last = vae.quant_conv if isinstance(vae, AutoencoderKLQwenImage) else vae.encoder.conv_out
    half = last.out_channels // 2
    with torch.no_grad():
        last.weight[half:] = 0.0
        last.bias[half:] = -60.0  # clamped to -30 by diffusers: a standard deviation of 3e-7
    return vae


@pytest.fixture(scope="module")
def flux_vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """FLUX.1's kind, 4 latent channels, factor 4; the model, and the pipeline's folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[4, 4, 8],
            norm_num_groups=2,
            latent_channels=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    folder = tmp_path_factory.mktemp("flux")
    _exact(vae).eval().save_pretrained(folder / "vae")
    return vae, folder


@pytest.fixture(scope="module")
def qwen_vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Qwen-Image's kind, 4 latent channels, factor 4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.7571, 0.4134, 0.0, 1.5508],
            latents_std=[2.8184, 1.4541, 0.5, 1.0],
        )
    folder = tmp_path_factory.mktemp("qwen")
    _exact(vae).eval().save_pretrained(folder / "vae")
    return vae, folder


def _model(kind: str, folder: Path) -> ModelConfig:
    family = {"flux": "flux", "qwen": "qwen_image"}[kind]
    tree = {"family": family, "path": "x", "codec": "vae", "vae": str(folder / "vae")}
    return ModelConfig.model_validate(tree)


def _codec(family: str, folder: Path) -> Codec:
    model = {"family": family, "path": str(folder / "transformer"), "codec": "vae"}
    return build_codec(ModelConfig.model_validate(model))


@torch.no_grad()
def test_flux_latents_are_the_pipelines(flux_vae: tuple[Any, Path]) -> None:
    vae, folder = flux_vae
    codec, pictures = _codec("flux", folder), _pictures(2, 16, 24)
    pipeline = FluxImg2ImgPipeline(None, vae, None, None, None, None, None)
    expected = pipeline._encode_vae_image(pictures, torch.Generator().manual_seed(0))
    latents = codec.encode(pictures)
    assert latents.shape == (2, *codec.latent_shape(16, 24)) == (2, 4, 4, 6)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    decoded = vae.decode((latents / 0.3611) + 0.1159).sample
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=1e-5)


@torch.no_grad()
def test_qwen_image_latents_are_the_pipelines(qwen_vae: tuple[Any, Path]) -> None:
    vae, folder = qwen_vae
    codec, pictures = _codec("qwen_image", folder), _pictures(2, 16, 24)
    pipeline = QwenImageImg2ImgPipeline(None, vae, None, None, None)
    expected = pipeline._encode_vae_image(pictures[:, :, None], torch.Generator().manual_seed(0))
    latents = codec.encode(pictures)
    assert latents.shape == (2, *codec.latent_shape(16, 24)) == (2, 4, 4, 6)
    torch.testing.assert_close(latents, expected[:, :, 0], rtol=0, atol=1e-5)
    mean = torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1)
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1)
    decoded = vae.decode(latents[:, :, None] / inverse + mean).sample[:, :, 0]
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=1e-5)


@torch.no_grad()
def test_flux2_latents_are_the_pipelines(tmp_path: Path) -> None:
    """Normalised by the batch norm's statistics of 2×2 patches."""
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLFlux2(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[4, 4, 8],
            norm_num_groups=2,
            latent_channels=4,
        ).eval()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    vae.save_pretrained(tmp_path / "vae")
    codec, pictures = _codec("flux2", tmp_path), _pictures(2, 16, 24)
    pipeline = Flux2Pipeline(None, vae, None, None, None)
    patches = pipeline._encode_vae_image(pictures, torch.Generator())
    latents = codec.encode(pictures)
    assert latents.shape == (2, *codec.latent_shape(16, 24)) == (2, 4, 4, 6)
    expected = Flux2Pipeline._unpatchify_latents(patches)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    whole = Flux2Pipeline._unpatchify_latents(patches * std + vae.bn.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(codec.decode(latents), vae.decode(whole).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_dit_latents_are_scaled_only(flux_vae: tuple[Any, Path], tmp_path: Path) -> None:
    """DiT's VAE is Stable Diffusion's: no shift, 0.18215, which its oldest files don't write."""
    vae, folder = flux_vae
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "vae" / "config.json").read_text())
    del config["shift_factor"], config["scaling_factor"]
    (copy / "vae" / "config.json").write_text(json.dumps(config))
    codec, pictures = _codec("dit", copy), _pictures(1, 16, 16)
    latents = codec.encode(pictures)
    posterior = vae.encode(pictures).latent_dist
    mode = posterior.mode()
    noise = torch.randn(latents.shape)
    drawn = codec.encode(pictures, noise)
    zeros = torch.zeros_like(noise)
    assert torch.equal(codec.encode(pictures, zeros), latents) and not torch.equal(drawn, latents)
    with pytest.raises(ValueError, match="expected noise of shape"):
        codec.encode(pictures, noise[:1, :1])
    with pytest.raises(ValueError, match="pixels have no posterior"):
        PixelCodec().encode(pictures, noise)
    torch.testing.assert_close(latents, mode * 0.18215, rtol=1e-6, atol=1e-6)
    expected = (mode + posterior.std * noise) * 0.18215
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)
    decoded = vae.decode(1 / 0.18215 * latents).sample
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_a_picture_does_not_depend_on_its_batch(kind: str, request: pytest.FixtureRequest) -> None:
    _, folder = request.getfixturevalue(f"{kind}_vae")
    codec = build_codec(_model(kind, folder))
    pictures = _pictures(3, 16, 16).requires_grad_()
    latents = codec.encode(pictures)
    assert not latents.requires_grad
    assert torch.equal(latents[1:2], codec.encode(pictures[1:2]))
    assert torch.equal(codec.decode(latents)[1:2], codec.decode(latents[1:2]))
    assert codec.decode(latents.bfloat16()).dtype == torch.float32


def test_weights_are_read_at_the_first_use_only(flux_vae: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    shutil.copy(flux_vae[1] / "vae" / "config.json", tmp_path / "vae")
    codec = _codec("flux", tmp_path)
    assert codec.latent_shape(1024, 768) == (4, 256, 192)
    with pytest.raises(ValueError, match="cannot load the VAE .*vae"):
        codec.encode(_pictures(1, 16, 16))
    shutil.copy(flux_vae[1] / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae")
    assert codec.encode(_pictures(1, 16, 16)).shape == (1, 4, 4, 4)


def test_a_vae_without_all_weights_is_refused(flux_vae: tuple[Any, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(flux_vae[1], tmp_path / "copy"))
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="VAE .* decoder.conv_in.bias"):
        _codec("flux", copy).decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_what_a_vae_can_not_take(kind: str, request: pytest.FixtureRequest) -> None:
    _, folder = request.getfixturevalue(f"{kind}_vae")
    codec = build_codec(_model(kind, folder))
    for height, width in ((12, 16), (16, 20), (0, 16)):
        with pytest.raises(ValueError, match=f"multiples of 8 pixels, got {height}×{width}"):
            codec.latent_shape(height, width)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 12×16"):
        codec.encode(_pictures(1, 12, 16))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 16, 16\)"):
        codec.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\), got \(1, 16, 4, 4\)"):
        codec.decode(torch.zeros(1, 16, 4, 4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny'; supported: AutoencoderKL, "),
        (
            {"_class_name": "AutoencoderKL"},
            "lacks what AutoencoderKL needs: KeyError: 'latent_channels'",
        ),
        ({"_class_name": "AutoencoderKLQwenImage", "input_channels": 4}, "takes 4 picture"),
        ([], "expected an object"),
        (None, "isn't JSON"),
    ],
)
def test_folders_that_hold_no_known_vae(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "vae").mkdir()
    text = "{" if config is None else json.dumps(config)
    (tmp_path / "vae" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        _codec("flux", tmp_path)


@pytest.mark.parametrize("family", BUILT_IN)
@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_another_familys_vae_is_refused(
    family: str, kind: str, request: pytest.FixtureRequest
) -> None:
    vae, folder = request.getfixturevalue(f"{kind}_vae")
    name = type(vae).__name__
    if name in find_family(family).vaes:
        assert _codec(family, folder).name == name
        return
    with pytest.raises(ValueError) as error:
        _codec(family, folder)
    (expected,) = find_family(family).vaes
    assert f"model.family = {family} goes with a VAE of class {expected}, " in str(error.value)
    assert f"{folder / 'vae'} holds a {name}" in str(error.value)


def test_a_missing_vae_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="vae/config.json"):
        _codec("flux", tmp_path)
