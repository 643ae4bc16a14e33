"""Wan's few-step pipeline, and `piflow sample` of videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from piflow.backbones import Conditioning, WanBackbone
from piflow.backbones.wan import WanEncoderConfig
from piflow.commands import sample
from piflow.config import (
    DXPolicyConfig,
    GMFlowPolicyConfig,
    LoRAConfig,
    ModelConfig,
    PolicyConfig,
)  # fmt: skip
from piflow.inference import PiWanPipeline
from piflow.inference.pixels import frames_of, strip
from piflow.inference.served import ServedStudent
from piflow.inference.settings import SETTINGS_KEY, SamplingSettings, load_student
from piflow.roles.adapter import load_adapter, save_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.trio import Trio
from piflow.sampling import sample_few_step
from piflow.schedule import FewStep
from piflow.testing.models import save_model

FRAMES, HEIGHT, WIDTH, TOKENS = 5, 16, 32, 24
FEW_STEP = FewStep(3, 0.5, 2.0, 24)
PROMPTS = ["a red heart", "two blue stars on a hill"]
CALL = {"prompt": PROMPTS, "height": HEIGHT, "width": WIDTH, "max_sequence_length": TOKENS}
GM, GRID = GMFlowPolicyConfig(num_gaussians=3, logstd_inner_dim=8), DXPolicyConfig(num_points=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    save_model(folder, *_parts(folder), size=HEIGHT)
    return folder


def _parts(folder: Path) -> tuple[ModelConfig, WanEncoderConfig]:
    place = str(folder / "transformer")
    model = ModelConfig(family="wan", path=place, codec="vae", frames=FRAMES)
    return model, WanEncoderConfig(path=str(folder), max_tokens=TOKENS)


@pytest.fixture(scope="module")
def make_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def build(policy: PolicyConfig = GM) -> Path:
        model, encoder = _parts(base)
        clock = PolicyClock.of(FEW_STEP)
        generator = torch.Generator().manual_seed(0)
        lora = LoRAConfig(rank=2, dropout=0.0)
        backbone = WanBackbone.load(model.path)
        trio = Trio.from_backbone(backbone, lora, policy, clock, generator=generator)
        tensors = {
            name: parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in trio.trainable_parameters().items()
        }
        settings = SamplingSettings(
            model=model, encoder=encoder, height=HEIGHT, width=WIDTH, few_step=FEW_STEP,
            embedded_guidance=None,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("adapter")
        save_adapter(
            folder, backbone, tensors, policy, clock, base_model="base",
            metadata={SETTINGS_KEY: settings.model_dump_json()}, dtype="float32",
        )  # fmt: skip
        return folder

    return build


def loaded(base: Path, adapter: Path, **options: Any) -> Any:
    pipe = PiWanPipeline.from_pretrained(base, adapter=adapter, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, **options: Any) -> Tensor:
    """(B, C, F, h, w) of the call, before the autoencoder."""
    generator = torch.Generator().manual_seed(5)
    found: Tensor = pipe(**CALL, generator=generator, output_type="latent", **options).frames
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [GM, GRID], ids=["gm", "grid"])
def test_its_latents_are_the_samplers(
    policy: PolicyConfig, dtype: torch.dtype, base: Path, make_adapter: Callable[..., Path]
) -> None:
    """Same adapter, noise and prompts; in bfloat16 nothing but the network rounds."""
    adapter = make_adapter(policy)
    pipe = loaded(base, adapter, torch_dtype=dtype)
    tokens, _ = pipe.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    found = latents_of(pipe)
    assert found.shape == (2, 4, 2, HEIGHT // 4, WIDTH // 4)
    backbone = WanBackbone.load(base / "transformer", dtype=dtype)
    backbone.latent_frames = 2
    trio = Trio.from_adapter(backbone, load_adapter(adapter))
    cond = Conditioning(tokens, torch.full((2,), TOKENS))
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(5)).flatten(2, 3)
    with torch.no_grad():
        expected = sample_few_step(lambda x, s: trio.student(x, s, cond), noise, FEW_STEP)
    assert expected.abs().max() > 0.5
    # two encoder calls in bfloat16 don't give the same bits
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(found.flatten(2, 3), expected, rtol=0, atol=tolerance)


def test_a_saved_pipeline_draws_the_same_and_the_teacher_stays(
    base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from diffusers import WanPipeline

    teacher = WanPipeline.from_pretrained(base)
    teacher.set_progress_bar_config(disable=True)
    plain = {"num_frames": FRAMES, "num_inference_steps": 2, "guidance_scale": 1.0}
    before = latents_of(teacher, **plain)
    pipe = PiWanPipeline.from_pipe(teacher, adapter=str(make_adapter()))
    pipe.set_progress_bar_config(disable=True)
    expected = latents_of(pipe)
    assert torch.equal(latents_of(teacher, **plain), before)
    pipe.save_pretrained(tmp_path)
    again = PiWanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(again), expected)


def test_videos_of_other_lengths(base: Path, make_adapter: Callable[..., Path]) -> None:
    pipe = loaded(base, make_adapter())
    video = pipe(**CALL, output_type="np").frames
    assert video.shape == (2, FRAMES, HEIGHT, WIDTH, 3)
    assert latents_of(pipe, num_frames=9).shape[2] == 3
    refused = {
        "guidance_scale = 5": {"guidance_scale": 5.0},
        "num_frames: a video has 1 frame and a multiple of 4 more, got 8": {"num_frames": 8},
        "attention_kwargs": {"attention_kwargs": {}},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            pipe(**CALL, **options)
    with pytest.raises(ValueError, match="which are Wan 2.2's"):
        loaded(base, make_adapter(), boundary_ratio=0.5)


def test_sample_writes_animations_of_the_trained_length(
    base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = str(make_adapter())

    def draw(**choices: Any) -> list[str]:
        return sample.main(
            adapter, PROMPTS, out=str(tmp_path), seeds=[5], show_progress=False,
            choices=sample.Choices(base=str(base), **choices),
        )  # fmt: skip

    *files, sheet = draw()
    assert all(name.endswith(".webp") for name in files) and len(files) == 2
    with Image.open(files[0]) as animation:
        assert animation.n_frames == FRAMES and animation.info["loop"] == 0
        assert animation.width == 4 * WIDTH, "small ones are enlarged"
    assert Image.open(sheet).width > 4 * WIDTH
    *longer, _ = draw(frames=9)
    assert not set(longer) & set(files)
    with Image.open(longer[0]) as animation:
        assert animation.n_frames == 9
    with pytest.raises(ValueError, match="multiple of 4 more, got 8"):
        draw(frames=8)
    _, settings = load_student(adapter, str(base))
    assert settings.model.frames == FRAMES
    with pytest.raises(ValueError, match="makes videos, and this model gives pictures"):
        ServedStudent(adapter, base=str(base))


def test_a_strip_shows_first_and_last_frame() -> None:
    video = torch.rand(2, 3, 7 * 4, 6)
    apart = frames_of(video, 7)
    assert apart.shape == (2, 7, 3, 4, 6)
    row = strip(video, 7)
    assert row.shape == (2, 3, 4, 5 * 6)
    assert torch.equal(row[..., :6], apart[:, 0]) and torch.equal(row[..., -6:], apart[:, 6])
    assert strip(video, 1) is video
    assert strip(video, 2).shape == (2, 3, 14, 12)
