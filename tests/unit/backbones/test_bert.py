"""The encoder's own logic, on a BERT of two tiny layers with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.text import TextEncoder
from piflow.config import BertEncoderConfig
from piflow.storage.fingerprint import EncoderIdentity

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "cat", "a", "of"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path_factory.mktemp("encoder") / "model"
    path.mkdir()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    BertModel(config).save_pretrained(path)
    BertTokenizerFast({word: number for number, word in enumerate(WORDS)}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return build_encoder(BertEncoderConfig(path=str(folder), max_tokens=6))


def _identity(folder: Path, max_tokens: int = 6) -> EncoderIdentity:
    return encoder_identity(BertEncoderConfig(path=str(folder), max_tokens=max_tokens))


PROMPTS = ["red heart", "", "cat", "a cat of a cat of a red heart", "heart of a cat"]


def test_valid_tokens_only_and_pooled_is_their_mean(encoder: TextEncoder) -> None:
    encoded = encoder.encode(PROMPTS)
    assert [tuple(e.tokens.shape) for e in encoded] == [(n, 16) for n in (4, 2, 3, 6, 6)]
    assert [e.truncated for e in encoded] == [False, False, False, True, False]
    for tokens, pooled, *_ in encoded:
        torch.testing.assert_close(pooled, tokens.mean(0))


def test_truncation_keeps_the_first_tokens_and_the_end_mark(encoder: TextEncoder) -> None:
    long, short = encoder.encode(["a cat of a cat", "a cat of a"])
    torch.testing.assert_close(long.tokens, short.tokens)
    assert (long.truncated, short.truncated) == (True, False)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_do_not_depend_on_the_batch(encoder: TextEncoder, batch_size: int) -> None:
    together = encoder.encode(PROMPTS, batch_size)
    for prompt, (tokens, pooled, truncated, *_) in zip(PROMPTS, together, strict=True):
        [alone] = encoder.encode([prompt])
        torch.testing.assert_close(alone.tokens, tokens, rtol=0, atol=2e-6)
        torch.testing.assert_close(alone.pooled, pooled, rtol=0, atol=2e-6)
        assert alone.truncated == truncated


def test_progress_counts_prompts(encoder: TextEncoder) -> None:
    counts: list[int] = []
    encoder.encode(PROMPTS, 2, counts.append)
    assert counts == [2, 2, 1]
    assert encoder.encode([]) == []


def test_the_identity_follows_weights_and_limit_not_the_path(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    identity = _identity(folder)
    assert _identity(copy) == identity
    assert (identity.name, identity.hidden_size) == ("bert-2x16", 16)
    assert _identity(folder, 7) != identity
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = _identity(copy)
    assert changed.weights_sha256 != identity.weights_sha256


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_identity_follows_configuration_and_tokenizer(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_text((copy / name).read_text() + "\n")
    assert _identity(copy).weights_sha256 != _identity(folder).weights_sha256
    (copy / "README.md").write_text("not what the encoder is")
    (copy / name).write_text((folder / name).read_text())
    assert _identity(copy) == _identity(folder)


def test_unusable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        _identity(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no config.json; expected a transformers folder"):
        _identity(tmp_path)
    with pytest.raises(ValueError, match="max_tokens is 21, .* takes at most 20"):
        _identity(folder, 21)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no .safetensors weights"):
        _identity(copy)
    (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match="holds no tokenizer: expected tokenizer.json"):
        _identity(copy)
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="lacks num_hidden_layers or hidden_size"):
        _identity(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="isn't JSON"):
        _identity(copy)


def test_a_folder_without_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    without_pooler = {name: w for name, w in weights.items() if not name.startswith("pooler.")}
    assert len(without_pooler) < len(weights)
    save_file(without_pooler, copy / "model.safetensors", {"format": "pt"})
    config = BertEncoderConfig(path=str(copy), max_tokens=6)
    build_encoder(config)  # pooled is a mean, BERT's own pooler isn't used
    del without_pooler["encoder.layer.1.output.dense.weight"]
    save_file(without_pooler, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of .* encoder.layer.1.output.dense.weight"):
        build_encoder(config)
