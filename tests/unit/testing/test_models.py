"""Tiny models: the pipelines' own loaders take them, every input matters, the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from piflow import storage
from piflow.backbones import build_codec, load_backbone
from piflow.backbones.dit import ClassLabelEncoderConfig
from piflow.backbones.encoders import build_encoder
from piflow.backbones.flux import FluxEncoderConfig
from piflow.backbones.flux2 import Flux2EncoderConfig
from piflow.backbones.qwen_image import QwenImageEncoderConfig
from piflow.backbones.qwen_image.text import DROPPED_TOKENS, TEMPLATE
from piflow.backbones.sd3 import SD3EncoderConfig
from piflow.config import BertEncoderConfig, EncoderConfig, ModelConfig
from piflow.inference.settings import SamplingSettings, encode_prompts
from piflow.testing.models import save_model

SIZE = 16
PROMPTS = {"dit": ["3", "4"]}
PIXELS = "flux-pixels"
FAMILIES = ["flux", "flux2", "qwen_image", "sd3", "dit"]


def sections(kind: str, folder: Path) -> tuple[ModelConfig, EncoderConfig]:
    """The recipe's `model` and `encoder` for a folder of this kind."""
    path = str(folder / "transformer")
    if kind == PIXELS:
        return ModelConfig(path=path), BertEncoderConfig(path=f"{folder}/encoder", max_tokens=16)
    encoders: dict[str, EncoderConfig] = {
        "flux": FluxEncoderConfig(path=str(folder), max_tokens=16),
        "flux2": Flux2EncoderConfig(path=str(folder), max_tokens=16),
        "qwen_image": QwenImageEncoderConfig(path=str(folder), max_tokens=16),
        "sd3": SD3EncoderConfig(path=str(folder), max_tokens=16),
        "dit": ClassLabelEncoderConfig(),
    }
    model = ModelConfig.model_validate({"family": kind, "path": path, "codec": "vae"})
    return model, encoders[kind]


def save(kind: str, folder: Path, seed: int = 0) -> tuple[ModelConfig, EncoderConfig]:
    model, encoder = sections(kind, folder)
    save_model(
        folder,
        model,
        encoder,
        size=SIZE,
        guidance_embeds="flux" in kind and kind != PIXELS,
        seed=seed,
    )
    return model, encoder


@pytest.fixture(scope="module", params=[*FAMILIES, PIXELS])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, folder


def test_the_pipelines_own_loader_takes_the_folder(saved: tuple[str, Path]) -> None:
    from diffusers import (
        DiTPipeline,
        Flux2Pipeline,
        FluxPipeline,
        QwenImagePipeline,
        StableDiffusion3Pipeline,
    )

    kind, folder = saved
    if kind == PIXELS:
        assert not (folder / "model_index.json").exists()  # no pipeline has such parts
        return
    classes: dict[str, Any] = {
        "flux": FluxPipeline, "qwen_image": QwenImagePipeline, "dit": DiTPipeline,
        "sd3": StableDiffusion3Pipeline, "flux2": Flux2Pipeline,
    }  # fmt: skip
    pipe = classes[kind].from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"class_labels": [3]} if kind == "dit" else {
        "prompt": "red heart", "height": SIZE, "width": SIZE,
    }  # fmt: skip
    picture = pipe(**call, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (SIZE, SIZE, 3) and picture.std() > 0


def test_prompts_and_noise_change_the_picture(saved: tuple[str, Path]) -> None:
    """Two prompts are told apart within `max_tokens`, in the velocity and so in the picture."""
    kind, folder = saved
    model, encoder = sections(kind, folder)
    settings = SamplingSettings(
        model=model, encoder=encoder, height=SIZE, width=SIZE, nfe=2, final_step_size_scale=1.0,
        shift=1.0, total_substeps=8, embedded_guidance=None,
    )  # fmt: skip
    cond = encode_prompts(settings, PROMPTS.get(kind, ["red heart", "cat"]))
    backbone = load_backbone(model, embedded_guidance=3.5 if kind in ("flux", "flux2") else None)
    codec = build_codec(model)
    shape = codec.latent_shape(SIZE, SIZE)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).expand(2, *shape)
    with torch.no_grad():
        velocity = backbone(x, torch.full((2,), 0.7), cond)
    pictures = codec.decode(velocity)
    assert pictures.shape == (2, 3, SIZE, SIZE)
    assert float((velocity[0] - velocity[1]).abs().max()) > 1e-2
    assert float((pictures[0] - pictures[1]).abs().max()) > 1e-3


def test_the_template_has_as_many_tokens_as_with_the_real_tokenizer(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    save("qwen_image", tmp_path)
    tokenizer = Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    before = TEMPLATE.partition("{}")[0]
    assert len(tokenizer(before)["input_ids"]) == DROPPED_TOKENS


def test_encoders_refuse_nothing_that_recipes_ask(saved: tuple[str, Path]) -> None:
    kind, folder = saved
    _, encoder = sections(kind, folder)
    empty, word = build_encoder(encoder).encode(["", PROMPTS.get(kind, ["cat", ""])[0]])
    assert len(empty.tokens) >= 1 and not word.truncated


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_arguments_give_the_same_folder(kind: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        save(kind, tmp_path / name, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two, other = (weights(tmp_path / name) for name in ("one", "two", "other"))
    assert one.keys() == two.keys() == other.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    files = [
        {
            str(path.relative_to(tmp_path / name)): storage.sha256(str(path))
            for path in (tmp_path / name).rglob("*.json")
        }
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("size", [0, -4, 18])
def test_sizes_that_the_models_do_not_take(size: int, tmp_path: Path) -> None:
    model, encoder = sections("flux", tmp_path)
    with pytest.raises(ValueError, match=f"multiple of 4 pixels as size, got {size}"):
        save_model(tmp_path, model, encoder, size=size)
