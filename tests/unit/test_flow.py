"""Noising and drawn noise: exact ends, precision, one source of randomness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piflow.flow import draw_noise, noised

F64 = torch.float64
X0, NOISE = torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)


def column(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.reshape(-1, 1, 1, 1)


@given(sigma=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_noised_is_the_line_from_data_to_noise(sigma: list[float]) -> None:
    """In float64 the velocity u = eps - x0 leads back to both ends."""
    level, x0, noise = torch.tensor(sigma, dtype=F64), X0.double(), NOISE.double()
    x, u = noised(x0, noise, level), noise - x0
    torch.testing.assert_close(x - column(level) * u, x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(x + (1 - column(level)) * u, noise, rtol=0, atol=1e-14)


def test_both_ends_are_exact() -> None:
    ends = torch.tensor([0.0, 1.0, 0.0])
    found = noised(X0, NOISE, ends)
    assert torch.equal(found[0], X0[0]) and torch.equal(found[1], NOISE[1])


def test_half_precision_is_noised_in_float32() -> None:
    half, level = X0.bfloat16(), torch.full((3,), 0.3)
    found = noised(half, NOISE, level)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 0.7 * half.float() + 0.3 * NOISE, rtol=1e-6, atol=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2, 4, 5\) and \(1, 2, 4, 5\)"):
        noised(X0, NOISE[:1], torch.zeros(3))


def test_noise_is_the_generators_alone() -> None:
    torch.manual_seed(0)
    first = draw_noise((2, 3), torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(first, draw_noise((2, 3), generator))
    assert not torch.equal(first, draw_noise((2, 3), generator))
    assert first.dtype == torch.float32
