"""Qwen-Image's encoder against diffusers' own `QwenImagePipeline.encode_prompt`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.qwen_image import QwenImageEncoderConfig
from piflow.backbones.qwen_image.text import DROPPED_TOKENS, TEMPLATE
from piflow.backbones.text import TextEncoder

TEMPLATE_BYTES = len(TEMPLATE.replace("<|im_start|>", "s").replace("<|im_end|>", "e")) - 2
MAX_TOKENS = TEMPLATE_BYTES - DROPPED_TOKENS + 20  # the tiny tokenizer's tokens are bytes
PROMPTS = ["a red heart", "{}", "", "pizza", "a red heart that is longer than what fits"]


def _config(folder: Path, max_tokens: int = MAX_TOKENS) -> QwenImageEncoderConfig:
    return QwenImageEncoderConfig(path=str(folder), max_tokens=max_tokens)


@pytest.fixture(scope="module")
def encoder(qwen_text_folder: Path) -> TextEncoder:
    return build_encoder(_config(qwen_text_folder))


@pytest.fixture(scope="module")
def pipeline(qwen_text_folder: Path) -> Any:
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    text_encoder = qwen_text_folder / "text_encoder"
    return QwenImagePipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(text_encoder),
        tokenizer=Qwen2Tokenizer.from_pretrained(qwen_text_folder / "tokenizer"),
    )


def test_the_template_is_the_pipelines(pipeline: Any) -> None:
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == DROPPED_TOKENS


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_it_gives_what_the_pipeline_gives(
    encoder: TextEncoder, pipeline: Any, batch_size: int
) -> None:
    """Ragged prompts and a truncated one: the pipeline encodes it whole and cuts afterwards."""
    with torch.no_grad():
        tokens, mask = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=MAX_TOKENS)
    encoded = encoder.encode(PROMPTS, batch_size)
    rest = TEMPLATE_BYTES - DROPPED_TOKENS
    assert [len(e.tokens) for e in encoded] == [rest + n for n in (11, 2, 0, 5, 20)]
    assert mask.sum(1).tolist() == [len(e.tokens) for e in encoded]
    for row, prompt in enumerate(encoded):
        expected = tokens[row, : len(prompt.tokens)]
        torch.testing.assert_close(prompt.tokens, expected, rtol=0, atol=1e-5)
        assert prompt.pooled is None
        assert prompt.truncated == (row == 4)
    assert (tokens[0, rest : rest + 2] - tokens[1, rest : rest + 2]).abs().min() > 1e-4


def test_the_identity_is_the_language_models(qwen_text_folder: Path, tmp_path: Path) -> None:
    identity = encoder_identity(_config(qwen_text_folder))
    assert identity.name == "qwen2.5-vl-2x16"
    assert (identity.max_tokens, identity.hidden_size) == (MAX_TOKENS, 16)
    copy = Path(shutil.copytree(qwen_text_folder, tmp_path / "copy"))
    assert encoder_identity(_config(copy)) == identity
    assert encoder_identity(_config(copy, 100)) != identity
    config = copy / "text_encoder" / "config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps(tree | tree.pop("text_config") | {"model_type": "qwen2_5_vl"}))
    assert encoder_identity(_config(copy)).name == identity.name  # sizes at the top, as of old


def test_unusable_folders_are_refused(qwen_text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 1025, Qwen-Image takes at most 1024"):
        encoder_identity(_config(qwen_text_folder, 1025))
    copy = Path(shutil.copytree(qwen_text_folder, tmp_path / "copy"))
    config = copy / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"qwen2_5_vl"', '"qwen2_vl"'))
    with pytest.raises(ValueError, match="model_type 'qwen2_vl', expected 'qwen2_5_vl'"):
        encoder_identity(_config(copy))
    shutil.rmtree(copy / "tokenizer")
    config.write_text(config.read_text().replace('"qwen2_vl"', '"qwen2_5_vl"'))
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        encoder_identity(_config(copy))


def test_a_tokenizer_that_swallows_the_template_is_refused(
    qwen_text_folder: Path, tmp_path: Path
) -> None:
    from transformers import Qwen2Tokenizer

    copy = Path(shutil.copytree(qwen_text_folder, tmp_path / "copy"))
    shutil.rmtree(copy / "tokenizer")
    tokenizer = Qwen2Tokenizer({"<|endoftext|>": 0, "e": 1}, [])  # all other bytes are unknown
    tokenizer.save_pretrained(copy / "tokenizer")
    assert 0 < len(tokenizer(TEMPLATE.format("")).input_ids) <= DROPPED_TOKENS
    with pytest.raises(ValueError, match="no more than 34 tokens of Qwen-Image's template"):
        build_encoder(_config(copy))
