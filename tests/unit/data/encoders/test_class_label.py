"""Class labels as prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from piflow.config import BertEncoderConfig, ClassLabelEncoderConfig
from piflow.data.encoders import build_encoder, check_prompts, encoder_identity
from piflow.data.prompts import Prompt
from piflow.data.store import EmbeddingStore

CONFIG = ClassLabelEncoderConfig(num_classes=1000)


def test_a_prompt_is_its_class_and_the_empty_prompt_the_null_class() -> None:
    encoded = build_encoder(CONFIG).encode(["7", "0", "", "999"], batch_size=3)
    for prompt, expected in zip(encoded, [7.0, 0.0, 1000.0, 999.0], strict=True):
        assert torch.equal(prompt.tokens, torch.zeros(1, 1)) and not prompt.truncated
        assert prompt.pooled is not None and torch.equal(prompt.pooled, torch.tensor([expected]))


@pytest.mark.parametrize("prompt", ["1000", "-1", "1.0", "cat", " 3", "³", "٣"])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a class of encoder.num_classes = 1000; write"):
        build_encoder(CONFIG).encode(["1", prompt])
    with pytest.raises(ValueError, match="is not a class"):
        check_prompts(CONFIG, ["1", prompt])
    check_prompts(BertEncoderConfig(path="unused"), ["1", prompt])


def test_the_identity_is_the_number_of_classes() -> None:
    identity = encoder_identity(CONFIG)
    assert identity == build_encoder(CONFIG).identity
    assert (identity.name, identity.max_tokens, identity.hidden_size) == ("class-label-1000", 1, 1)
    assert encoder_identity(ClassLabelEncoderConfig(num_classes=10)) != identity


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_class_numbers_survive_the_store_exactly(
    tmp_path: Path, write_store: Callable[..., EmbeddingStore], dtype: str
) -> None:
    encoder = build_encoder(CONFIG)
    prompts = [Prompt(str(number), 256, 256) for number in range(0, 1000, 37)]
    store = write_store(
        str(tmp_path / "store"),
        prompts,
        lambda prompt: encoder.encode([prompt.text])[0],
        identity=encoder.identity,
        dtype=dtype,
    )
    batch = store.read(range(len(prompts)))
    assert batch.pooled is not None
    assert batch.pooled[:, 0].tolist() == [float(number) for number in range(0, 1000, 37)]
    assert torch.equal(batch.tokens, torch.zeros(len(prompts), 1, 1))
    assert batch.num_tokens.tolist() == [1] * len(prompts)
    empty = store.empty_prompt().pooled
    assert empty is not None and empty.tolist() == [[1000.0]]
