"""Wan's encoder against diffusers' own `WanPipeline.encode_prompt`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.wan import WanEncoderConfig, tiny

PROMPTS = ["a red heart", "", "a &lt;   red\nfish", "a prompt that is longer than fits"]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    for name, part in tiny.text_parts(WanEncoderConfig(path=str(made))):
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        part.save_pretrained(made / name)
    return made


def _config(folder: Path, max_tokens: int = MAX_TOKENS) -> WanEncoderConfig:
    return WanEncoderConfig(path=str(folder), max_tokens=max_tokens)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_gives_what_the_pipeline_gives(folder: Path, batch_size: int) -> None:
    from diffusers import WanPipeline
    from transformers import T5TokenizerFast, UMT5EncoderModel

    pipeline: Any = WanPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=T5TokenizerFast.from_pretrained(folder / "tokenizer"),
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            list(PROMPTS), do_classifier_free_guidance=False, device="cpu",
            max_sequence_length=MAX_TOKENS,
        )  # fmt: skip
    encoded = build_encoder(_config(folder)).encode(PROMPTS, batch_size)
    for prompt, states in zip(encoded, expected, strict=True):
        padded = torch.zeros(MAX_TOKENS, prompt.tokens.shape[1])
        padded[: len(prompt.tokens)] = prompt.tokens
        torch.testing.assert_close(padded, states, rtol=0, atol=1e-5)
        assert prompt.pooled is None
    lengths = [len(prompt.tokens) for prompt in encoded]
    assert lengths[1] < lengths[2] < lengths[3] == MAX_TOKENS
    assert [prompt.truncated for prompt in encoded] == [False, False, False, True]


def test_the_identity_is_the_models(folder: Path, tmp_path: Path) -> None:
    identity = encoder_identity(_config(folder))
    assert (identity.name, identity.max_tokens, identity.hidden_size) == ("umt5-1x16", 24, 16)
    with pytest.raises(ValueError, match="encoder.max_tokens is 513, Wan takes at most 512"):
        encoder_identity(_config(folder, 513))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    with pytest.raises(ValueError, match="model_type 't5', expected 'umt5'"):
        encoder_identity(_config(copy))
