"""Averages: the power schedule's closed form, fixed beta, in place."""

from __future__ import annotations

import pytest
import torch

from piflow.ema import ema_beta, ema_update, karras_beta


def test_karras_beta_values() -> None:
    assert karras_beta(1) == 0.0
    assert karras_beta(2) == pytest.approx(0.5**8)
    assert karras_beta(100, gamma=7.0) == pytest.approx(0.99**8)


@pytest.mark.parametrize("gamma", [0.0, 3.0, 7.0])
def test_power_schedule_has_a_closed_form(gamma: float) -> None:
    """The average after t steps weighs x_i by i^(g+1) - (i-1)^(g+1), over t^(g+1)."""
    values = torch.randn(30, 4, dtype=torch.float64)
    average = torch.full((4,), 1e6, dtype=torch.float64)
    for step, value in enumerate(values, start=1):
        ema_update([average], [value], karras_beta(step, gamma))
    edges = torch.arange(31, dtype=torch.float64) ** (gamma + 1)
    expected = (edges.diff()[:, None] * values).sum(0) / edges[-1]
    torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def test_fixed_beta_is_in_place_and_converts() -> None:
    average = torch.zeros(3)
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    for _ in range(3):
        ema_update([average], [parameter], 0.9)
    torch.testing.assert_close(average, torch.full((3,), 1 - 0.9**3))
    assert average.dtype == torch.float32 and not average.requires_grad


def test_share_of_the_old_average_along_a_run() -> None:
    power = [ema_beta(step, gamma=7.0, start=3) for step in range(6)]
    assert power == [0.0, 0.0, 0.0, karras_beta(1), karras_beta(2), karras_beta(3)]
    assert power[4] > 0
    assert [ema_beta(step, beta=0.9, start=2) for step in range(4)] == [0, 0, 0.9, 0.9]


def test_fixed_beta_has_a_closed_form() -> None:
    """After n updates: beta^n of the start, (1 - beta) beta^(n - i) of the i-th value."""
    values = torch.randn(30, 4, dtype=torch.float64)
    average = torch.full((4,), 3.0, dtype=torch.float64)
    for value in values:
        ema_update([average], [value], ema_beta(0, beta=0.8, start=0))
    powers = 0.8 ** torch.arange(29, -1, -1, dtype=torch.float64)
    expected = 3.0 * 0.8**30 + 0.2 * (powers[:, None] * values).sum(0)
    torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def test_bad_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="step >= 1"):
        karras_beta(0)
    with pytest.raises(ValueError, match=r"beta in \[0, 1\]"):
        ema_update([torch.zeros(1)], [torch.zeros(1)], 1.5)
    with pytest.raises(ValueError, match="align"):
        ema_update([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], 0.5)
    with pytest.raises(ValueError, match="align"):
        ema_update([torch.zeros(1)], [torch.zeros(2)], 0.5)
