"""Distances of sets of features: those of pictures, and those of the pictures they are compared to.

The Fréchet and the kernel distance are torchmetrics', which takes features of any network.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

NEIGHBOURS = 3  # of precision and recall, as published
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as torchmetrics has them
_ROWS = 1024  # of a matrix of distances at a time


class _AsGiven(nn.Module):
    """A feature network for torchmetrics, to which features are given in place of pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, others: Tensor) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and covariances of two sets.

    Heusel et al. 2017 (arXiv:1706.08500), section 3, there of Inception's features.

    Args:
        features, others: ``(N, D)`` and ``(M, D)`` float64, at least two each.

    Returns:
        ``()`` float64.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsGiven(features.shape[1]))
    metric.update(others, real=True)
    metric.update(features, real=False)
    return metric.compute().double()


def kernel_distance(features: Tensor, others: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)^3.

    The mean over 100 random subsets of 1000 of each set, or of one of all where they are smaller.
    Bińkowski et al. 2018 (arXiv:1801.01401), section 4, there of Inception's features.

    Args:
        features, others: as of `frechet_distance`.

    Returns:
        ``()`` float64; a little below 0 for sets of one distribution.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET_SIZE, len(features), len(others))
    whole = size == len(features) == len(others)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=_AsGiven(features.shape[1]), subsets=1 if whole else SUBSETS, subset_size=size
        )
        metric.update(others, real=True)
        metric.update(features, real=False)
        return metric.compute()[0].double()


def precision_recall(
    features: Tensor, others: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[Tensor, Tensor]:
    """Share of `features` inside the manifold of `others`, and of `others` inside theirs.

    A set's manifold is the union of the balls around its members that reach to their `neighbours`
    nearest. Kynkäänniemi et al. 2019 (arXiv:1904.06991), equation 2.

    Args:
        features, others: ``(N, D)`` and ``(M, D)`` float64, more than `neighbours` each.

    Returns:
        Two ``()`` float64.
    """
    return _inside(features, others, neighbours), _inside(others, features, neighbours)


def _inside(points: Tensor, members: Tensor, neighbours: int) -> Tensor:
    radii = torch.cat(
        [rows.kthvalue(neighbours + 1).values for rows in _distances(members, members)]
    )  # of a member itself, the nearest is itself
    return (
        torch.cat([(rows <= radii).any(1) for rows in _distances(points, members)]).double().mean()
    )


def _distances(points: Tensor, members: Tensor) -> Iterator[Tensor]:
    for some in points.split(_ROWS):
        yield torch.cdist(some, members)
