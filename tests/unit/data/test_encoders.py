"""The encoder's own logic, on a BERT of two tiny layers with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from piflow.data.encoders import BertEncoder, encoder_identity

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
def encoder(folder: Path) -> BertEncoder:
    return BertEncoder(str(folder), max_tokens=6)


PROMPTS = ["red heart", "", "cat", "a cat of a cat of a red heart", "heart of a cat"]


def test_valid_tokens_only_and_pooled_is_their_mean(encoder: BertEncoder) -> None:
    encoded = encoder.encode(PROMPTS)
    assert [tuple(e.tokens.shape) for e in encoded] == [(n, 16) for n in (4, 2, 3, 6, 6)]
    assert [e.truncated for e in encoded] == [False, False, False, True, False]
    for tokens, pooled, _ in encoded:
        torch.testing.assert_close(pooled, tokens.mean(0))


def test_truncation_keeps_the_first_tokens_and_the_end_mark(encoder: BertEncoder) -> None:
    long, short = encoder.encode(["a cat of a cat of a red heart", "a cat of a"])
    torch.testing.assert_close(long.tokens, short.tokens)
    assert encoder.count_tokens(["a cat of a cat", "a cat of a"]) == [7, 6]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_do_not_depend_on_the_batch(encoder: BertEncoder, batch_size: int) -> None:
    together = encoder.encode(PROMPTS, batch_size)
    for prompt, (tokens, pooled, truncated) in zip(PROMPTS, together, strict=True):
        [alone] = encoder.encode([prompt])
        torch.testing.assert_close(alone.tokens, tokens, rtol=0, atol=2e-6)
        torch.testing.assert_close(alone.pooled, pooled, rtol=0, atol=2e-6)
        assert alone.truncated == truncated


def test_progress_counts_prompts(encoder: BertEncoder) -> None:
    counts: list[int] = []
    encoder.encode(PROMPTS, 2, counts.append)
    assert counts == [2, 2, 1]
    assert encoder.encode([]) == []


def test_the_identity_follows_weights_and_limit_not_the_path(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    identity = encoder_identity(str(folder), 6)
    assert encoder_identity(str(copy), 6) == identity
    assert (identity.name, identity.hidden_size) == ("bert-2x16", 16)
    assert encoder_identity(str(folder), 7) != identity
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = encoder_identity(str(copy), 6)
    assert changed.weights_sha256 != identity.weights_sha256


def test_unusable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        encoder_identity(str(tmp_path / "absent"), 6)
    with pytest.raises(ValueError, match="has no config.json; expected a transformers folder"):
        encoder_identity(str(tmp_path), 6)
    with pytest.raises(ValueError, match="max_tokens is 21, .* takes at most 20"):
        encoder_identity(str(folder), 21)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no .safetensors weights"):
        encoder_identity(str(copy), 6)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks num_hidden_layers"):
        encoder_identity(str(copy), 6)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        encoder_identity(str(copy), 6)
