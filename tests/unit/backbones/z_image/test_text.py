"""Z-Image's encoder against diffusers' own `ZImagePipeline.encode_prompt`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones import qwen3_tiny
from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.z_image import ZImageEncoderConfig

PROMPTS = ["a red heart", "{}", "", "pizza", "a red heart that is longer than what fits"]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("z_image")
    torch.manual_seed(0)
    for name, part in qwen3_tiny.text_parts(layers=3):
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        part.save_pretrained(made / name)
    return made


def _config(folder: Path, max_tokens: int = MAX_TOKENS) -> ZImageEncoderConfig:
    return ZImageEncoderConfig(path=str(folder), max_tokens=max_tokens)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_it_gives_what_the_pipeline_gives(folder: Path, batch_size: int) -> None:
    from diffusers import ZImagePipeline
    from transformers import Qwen2Tokenizer, Qwen3Model

    pipeline: Any = ZImagePipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            list(PROMPTS), "cpu", do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
        )
    encoded = build_encoder(_config(folder)).encode(PROMPTS, batch_size)
    assert [len(prompt.tokens) for prompt in encoded] == [17, 8, 6, 11, 24]
    for prompt, states in zip(encoded, expected, strict=True):
        torch.testing.assert_close(prompt.tokens, states, rtol=0, atol=1e-5)
        assert prompt.pooled is None
    assert [prompt.truncated for prompt in encoded] == [False] * 4 + [True]


def test_the_identity_is_the_language_models(folder: Path, tmp_path: Path) -> None:
    identity = encoder_identity(_config(folder))
    assert identity.name == "qwen3-3x16, layers -2"
    assert (identity.max_tokens, identity.hidden_size) == (MAX_TOKENS, 16)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert encoder_identity(_config(copy)) == identity
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="model_type 'qwen2', expected 'qwen3'"):
        encoder_identity(_config(copy))


def test_a_tokenizer_without_a_chat_template(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        build_encoder(_config(copy))
