"""Stable Diffusion 3's encoders against diffusers' own `StableDiffusion3Pipeline.encode_prompt`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.sd3 import SD3EncoderConfig
from piflow.backbones.text import TextEncoder
from piflow.config import ModelConfig
from piflow.testing.models import save_model

T5_TOKENS, CLIP_TOKENS = 12, 16
PROMPTS = ["red heart", "", "a cat of a red heart in a red cup of tea", "Two  hearts"]


def _config(folder: Path, **changes: Any) -> SD3EncoderConfig:
    return SD3EncoderConfig(**({"path": str(folder), "max_tokens": T5_TOKENS} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny pipeline."""
    path = tmp_path_factory.mktemp("sd3")
    model = ModelConfig(family="sd3", path=str(path / "transformer"), codec="vae")
    save_model(path, model, _config(path), size=16)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return build_encoder(_config(folder))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_gives_what_the_pipeline_gives(
    folder: Path, encoder: TextEncoder, batch_size: int
) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(str(folder), local_files_only=True)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
    assert tokens.shape == (4, CLIP_TOKENS + T5_TOKENS, encoder.identity.hidden_size)
    encoded = encoder.encode(PROMPTS, batch_size)
    for row, prompt in enumerate(encoded):
        assert prompt.pooled is not None
        torch.testing.assert_close(prompt.tokens, tokens[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(prompt.pooled, pooled[row], rtol=0, atol=1e-5)
    assert [prompt.truncated for prompt in encoded] == [False, False, True, False]
    distances = torch.cdist(pooled, pooled) + torch.eye(len(PROMPTS))
    assert (distances > 0.01).all()  # the prompts do differ: the comparison says something


def test_dropped_padding_leaves_clips_and_the_prompts_own_states(
    folder: Path, encoder: TextEncoder
) -> None:
    dropped = build_encoder(_config(folder, padding="drop")).encode(PROMPTS)
    kept = encoder.encode(PROMPTS)
    assert [len(prompt.tokens) - CLIP_TOKENS for prompt in kept] == [T5_TOKENS] * 4
    assert [len(prompt.tokens) - CLIP_TOKENS for prompt in dropped] == [11, 1, T5_TOKENS, T5_TOKENS]
    for short, whole in zip(dropped, kept, strict=True):
        torch.testing.assert_close(short.tokens, whole.tokens[: len(short.tokens)])


def test_the_identity_names_all_encoders_and_padding(folder: Path) -> None:
    identity = encoder_identity(_config(folder))
    assert identity.name == "t5-1x32+clip-2x16+clip-2x16, padding keep"
    assert (identity.max_tokens, identity.hidden_size) == (CLIP_TOKENS + T5_TOKENS, 32)
    assert encoder_identity(_config(folder, padding="drop")) != identity


def test_unusable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 513, Stable Diffusion 3 takes at most 512"):
        encoder_identity(_config(folder, max_tokens=513))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = copy / "tokenizer" / "tokenizer_config.json"
    tree = json.loads(settings.read_text())
    settings.write_text(json.dumps(tree | {"model_max_length": CLIP_TOKENS + 1}))
    with pytest.raises(ValueError, match="pads to 17 tokens, the CLIP models take 16"):
        build_encoder(_config(copy))
    settings = copy / "text_encoder_2" / "config.json"
    tree = json.loads(settings.read_text())
    settings.write_text(json.dumps(tree | {"max_position_embeddings": 20}))
    with pytest.raises(
        ValueError, match=r"don't belong together: CLIP models of \[16, 20\] tokens"
    ):
        encoder_identity(_config(copy))
    shutil.rmtree(copy / "text_encoder_3")
    with pytest.raises(FileNotFoundError, match="text_encoder_3"):
        encoder_identity(_config(copy))
