"""Metrics against closed forms, brute force and the properties that make them fair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from piflow.evaluation import metrics


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error() -> None:
    reference = _randn(3, 3, 4, 4)
    offset = torch.tensor([0.2, 0.02, 2.0])[:, None, None, None]
    # MSE = offset^2, so PSNR = 20 log10(2 / offset)
    expected = torch.tensor([20.0, 40.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        metrics.psnr(reference + offset, reference), expected, atol=1e-4, rtol=0
    )


def test_psnr_data_range() -> None:
    a, b = _randn(2, 3, 4, 4), _randn(2, 3, 4, 4, seed=1)
    difference = metrics.psnr(a, b, data_range=2.0) - metrics.psnr(a, b, data_range=1.0)
    torch.testing.assert_close(difference, torch.full_like(difference, 20 * math.log10(2)))


def test_psnr_of_equal_pictures_is_infinite() -> None:
    a = _randn(2, 3, 4, 4)
    assert torch.isinf(metrics.psnr(a, a)).all()


def test_endpoint_psnr_averages_errors_not_decibels() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0] = 0.2  # 20 dB; the other picture is perfect
    assert metrics.endpoint_psnr(pictures, reference) == pytest.approx(20 + 10 * math.log10(2))
    assert float(metrics.psnr(pictures, reference).mean()) == math.inf


def test_endpoint_psnr_never_exceeds_the_mean_of_psnrs() -> None:
    reference = _randn(8, 3, 4, 4)
    pictures = (
        reference + _randn(8, 3, 4, 4, seed=1) * torch.linspace(0.1, 1, 8)[:, None, None, None]
    )
    mean = float(metrics.psnr(pictures, reference).mean())
    assert metrics.endpoint_psnr(pictures, reference) < mean


def test_psnr_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        metrics.psnr(_randn(2, 3, 4, 4), _randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="at least one picture"):
        metrics.psnr(torch.empty(0, 3, 4, 4), torch.empty(0, 3, 4, 4))


def test_diversity_equals_the_mean_over_all_pairs() -> None:
    pictures = _randn(3, 4, 3, 5, 6)
    for prompt, value in zip(pictures, metrics.pairwise_diversity(pictures), strict=True):
        pairs = [
            (a.double() - b.double()).square().mean().sqrt()
            for a, b in itertools.combinations(prompt, 2)
        ]
        torch.testing.assert_close(value, torch.stack(pairs).mean())


def test_diversity_ignores_the_order_of_seeds_and_a_common_shift() -> None:
    pictures = _randn(2, 5, 3, 4, 4)
    value = metrics.pairwise_diversity(pictures)
    torch.testing.assert_close(value, metrics.pairwise_diversity(pictures.flip(1)))
    torch.testing.assert_close(value, metrics.pairwise_diversity(pictures.double() + 3))
    torch.testing.assert_close(2 * value, metrics.pairwise_diversity(2 * pictures))


def test_diversity_of_independent_noise() -> None:
    # the RMS distance of two standard normal pictures is sqrt(2)
    value = metrics.pairwise_diversity(_randn(4, 4, 3, 32, 32))
    torch.testing.assert_close(value, torch.full_like(value, math.sqrt(2)), atol=0.02, rtol=0)


def test_diversity_needs_two_seeds() -> None:
    with pytest.raises(ValueError, match="at least two seeds"):
        metrics.pairwise_diversity(_randn(3, 1, 3, 4, 4))


def test_diversity_ratio_is_the_ratio_of_means() -> None:
    student, teacher = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 1.0])
    assert metrics.diversity_ratio(student, teacher) == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="teacher's diversity is 0"):
        metrics.diversity_ratio(student, torch.zeros(2))
    with pytest.raises(ValueError, match="one value a prompt"):
        metrics.diversity_ratio(student, torch.ones(3))


def test_intervals_are_seeded_and_hold_the_value() -> None:
    student = 0.5 + torch.rand(40, generator=torch.Generator().manual_seed(0))
    teacher = 1 + torch.rand(40, generator=torch.Generator().manual_seed(1))
    first = metrics.psnr_gain_interval(student, teacher, seed=7)
    assert first == metrics.psnr_gain_interval(student, teacher, seed=7)
    assert first != metrics.psnr_gain_interval(student, teacher, seed=8)
    assert first.value == pytest.approx(10 * math.log10(float(teacher.mean() / student.mean())))
    assert first.low < first.value < first.high
    ratio = metrics.diversity_ratio_interval(student, teacher)
    assert ratio.value == pytest.approx(metrics.diversity_ratio(student, teacher))
    assert ratio.low < ratio.value < ratio.high


def test_a_gain_that_every_prompt_shares_has_no_spread() -> None:
    teacher = 1 + torch.rand(30, generator=torch.Generator().manual_seed(0)).double()
    interval = metrics.psnr_gain_interval(teacher / 10, teacher)
    assert interval.value == pytest.approx(10)
    assert interval.low == pytest.approx(10)
    assert interval.high == pytest.approx(10)


def test_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        teacher = 0.5 + torch.rand(50, generator=generator)
        student = 0.5 + torch.rand(50, generator=generator)
        interval = metrics.diversity_ratio_interval(
            student, teacher, confidence=0.9, resamples=400, seed=seed
        )
        covered += interval.low <= 1.0 <= interval.high
    assert 0.82 <= covered / 200 <= 0.96


def test_a_perfect_student_has_an_infinite_gain() -> None:
    interval = metrics.psnr_gain_interval(torch.zeros(5), torch.ones(5))
    assert (interval.low, interval.value, interval.high) == (math.inf, math.inf, math.inf)


def test_interval_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="confidence must be in"):
        metrics.psnr_gain_interval(torch.ones(3), torch.ones(3), confidence=95)
    with pytest.raises(ValueError, match="P >= 1"):
        metrics.psnr_gain_interval(torch.ones(0), torch.ones(0))
