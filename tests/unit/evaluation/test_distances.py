"""Distances of sets against closed forms, their definitions and other people's code."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from piflow.evaluation.distances import frechet_distance, kernel_distance, precision_recall

pytest.importorskip("torchmetrics")


def normal(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, dtype=torch.float64, generator=generator)


def with_moments(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Features whose own mean and unbiased covariance are exactly these."""
    drawn = normal(count, len(mean), seed)
    drawn = drawn - drawn.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(drawn.T.cov()), drawn.T, upper=False
    ).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def covariance(width: int, seed: int) -> Tensor:
    root = normal(width, width, seed)
    return root @ root.T + torch.eye(width, dtype=torch.float64)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """Of diagonal covariances |m1 - m2|^2 + sum (s1 - s2)^2; of any by a matrix square root."""
    width = 6
    means = [normal(1, width, seed)[0] for seed in (1, 2)]
    deviations = [normal(1, width, seed)[0].abs() + 0.1 for seed in (3, 4)]
    sets = [
        with_moments(mean, torch.diag(deviation**2), count, count)
        for mean, deviation, count in zip(means, deviations, (40, 60), strict=True)
    ]
    expected = (means[0] - means[1]).square().sum() + (
        (deviations[0] - deviations[1]).square().sum()
    )
    assert float(frechet_distance(*sets)) == pytest.approx(float(expected), rel=1e-10)
    first, second = covariance(width, 5), covariance(width, 6)
    sets = [with_moments(means[0], first, 40, 7), with_moments(means[1], second, 50, 8)]
    root = np.trace(sqrtm(first.numpy() @ second.numpy()).real)
    expected = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * root
    assert float(frechet_distance(*sets)) == pytest.approx(float(expected), rel=1e-9)
    assert float(frechet_distance(sets[0], sets[0])) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    first, second = normal(9, 4, 1), normal(9, 4, 2) + 1

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3)

    own = [
        sum(kernel(a, b) for i, a in enumerate(some) for j, b in enumerate(some) if i != j) / 72
        for some in (first, second)
    ]
    between = sum(kernel(a, b) for a in first for b in second) / 81
    assert float(kernel_distance(first, second)) == pytest.approx(sum(own) - 2 * between, rel=1e-12)


def test_kernel_distance_of_subsets_repeats_and_leaves_other_numbers_alone() -> None:
    first, second = normal(30, 4, 1), normal(20, 4, 2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = kernel_distance(first, second)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(kernel_distance(first, second), found) and math.isfinite(found)
    assert float(kernel_distance(first, second + 3)) > float(found)


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_precision_and_recall_are_those_of_the_published_code(shift: float) -> None:
    from prdc import compute_prdc

    first, second = normal(50, 4, 1) * 0.7 + shift, normal(70, 4, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(second.numpy(), first.numpy(), nearest_k=3)
    precision, recall = precision_recall(first, second)
    assert float(precision) == pytest.approx(expected["precision"])
    assert float(recall) == pytest.approx(expected["recall"])
    if shift == 100:
        assert precision == recall == 0
    if shift == 0:
        assert 0 < recall < precision <= 1, "the first set is the narrower one"


def test_a_neighbourhood_reaches_to_the_third_neighbour() -> None:
    """Members 0, 1, 2, 4 on a line: the balls of 0 and 4 end at 4 and 0, that of 1 at 4."""
    members = torch.tensor([[0.0], [1.0], [2.0], [4.0]], dtype=torch.float64)
    points = torch.tensor([[-4.0], [-4.1], [8.0], [8.1]], dtype=torch.float64)
    precision, _ = precision_recall(points, members)
    assert precision == 0.5
    assert precision_recall(members, members) == (1, 1)
