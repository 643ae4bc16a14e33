"""Class labels through the embedding store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from piflow.backbones.dit import ClassLabelEncoderConfig
from piflow.backbones.encoders import build_encoder
from piflow.data.prompts import Prompt
from piflow.data.reader import EmbeddingStore

CONFIG = ClassLabelEncoderConfig(num_classes=1000)


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
