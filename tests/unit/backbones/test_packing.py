from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piflow.backbones.base import pack, unpack

sizes = st.integers(1, 5)


@given(batch=sizes, channels=sizes, rows=sizes, columns=sizes)
def test_unpack_inverts_pack(batch: int, channels: int, rows: int, columns: int) -> None:
    latents = torch.randn(batch, channels, 2 * rows, 2 * columns)
    tokens = pack(latents)
    assert tokens.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(unpack(tokens, 2 * rows, 2 * columns), latents)


def test_tokens_are_row_by_row_and_channel_major() -> None:
    """Feature 4c + 2i + j of token 3r + s is channel c at row 2r + i, column 2s + j."""
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = pack(latents)
    for token in range(6):
        for feature in range(8):
            row, column = 2 * (token // 3) + feature // 2 % 2, 2 * (token % 3) + feature % 2
            assert tokens[0, token, feature] == latents[0, feature // 4, row, column]


@pytest.mark.parametrize(("height", "width"), [(5, 6), (6, 5)])
def test_odd_latents_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"must be even, got {height}×{width}"):
        pack(torch.zeros(1, 12, height, width))
