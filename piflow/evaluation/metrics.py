"""What evaluation measures: endpoint PSNR, diversity within a prompt, and how sure we are of both.

Two samplers are compared *from the same noise and prompts*, so a picture of one has exactly one
counterpart among the other's, and the error between the two is the sampler's own.

Headline figures and why:

* **endpoint PSNR** is the PSNR of the squared error averaged over all pictures, not the average of
  the pictures' PSNRs: one perfect picture has an infinite PSNR and would carry the average alone.
* **diversity** of a prompt is the mean root-mean-square distance between its pictures of different
  seeds; a *ratio* of two samplers' is the ratio of their means over prompts.
* intervals are bootstraps over *prompts*: pictures of one prompt are not independent of each other.

Everything is accumulated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PICTURE_RANGE = 2.0  # pictures live in [-1, 1]


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap confidence interval, all in the figure's own unit."""

    value: float
    low: float
    high: float


def squared_error(pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of each picture: two ``(B, ...)`` of one shape -> ``(B,)`` float64.

    Raises:
        ValueError: the shapes differ, or there is no picture.
    """
    if pictures.shape != reference.shape:
        raise ValueError(
            f"pictures and reference must have one shape, got {tuple(pictures.shape)} and "
            f"{tuple(reference.shape)}; sample both from the same prompts and noise"
        )
    if pictures.dim() < 2 or pictures.numel() == 0:
        raise ValueError(
            f"expected at least one picture, (B, ...), got shape {tuple(pictures.shape)}"
        )
    return (pictures.double() - reference.double()).square().flatten(1).mean(1)


def psnr_of_error(mean_squared_error: Tensor, data_range: float = PICTURE_RANGE) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors of any shape; infinite for 0."""
    return 10 * torch.log10(data_range**2 / mean_squared_error.double())


def psnr(a: Tensor, b: Tensor, data_range: float = PICTURE_RANGE) -> Tensor:
    """PSNR of each picture in dB: two ``(B, ...)`` of one shape -> ``(B,)`` float64.

    Args:
        data_range: the largest value minus the smallest one a picture may have; 2 for [-1, 1].

    Raises:
        ValueError: the shapes differ, or there is no picture.
    """
    return psnr_of_error(squared_error(a, b), data_range)


def endpoint_psnr(pictures: Tensor, reference: Tensor, data_range: float = PICTURE_RANGE) -> float:
    """The headline: PSNR in dB of the squared error averaged over all pictures ``(B, ...)``.

    It is at most the average of the pictures' own PSNRs, since -log is convex (Jensen).
    """
    return float(psnr_of_error(squared_error(pictures, reference).mean(), data_range))


def pairwise_diversity(pictures: Tensor) -> Tensor:
    """Mean RMS distance between a prompt's pictures, over all pairs of its seeds.

    Args:
        pictures: ``(P, S, C, H, W)``, S >= 2 seeds for each of P prompts.

    Returns:
        ``(P,)`` float64, in units of the pictures' values.

    Raises:
        ValueError: not five dimensions, or fewer than two seeds.
    """
    if pictures.dim() != 5 or pictures.shape[1] < 2:
        raise ValueError(
            "diversity needs pictures (prompts, seeds >= 2, channels, height, width), got shape "
            f"{tuple(pictures.shape)}; evaluate with at least two seeds a prompt"
        )
    seeds = pictures.shape[1]
    flat = pictures.double().flatten(2)
    total = flat.new_zeros(flat.shape[0])
    # differences, not |a|^2 + |b|^2 - 2ab: near-equal pictures are just what must be seen here
    for first in range(seeds - 1):
        distance = (flat[:, first + 1 :] - flat[:, first : first + 1]).square().mean(2).sqrt()
        total += distance.sum(1)
    return total / (seeds * (seeds - 1) / 2)


def diversity_ratio(student: Tensor, teacher: Tensor) -> float:
    """Ratio of mean diversities ``(P,)`` over prompts; 1 = the student varies as the teacher does.

    Raises:
        ValueError: the prompts differ in number, or the teacher's pictures are all the same.
    """
    _check_pairs(student, teacher)
    if not bool(teacher.sum() > 0):
        raise ValueError(
            "the teacher's diversity is 0: its pictures of a prompt are all the same; check that "
            "every seed has its own noise"
        )
    return float(student.double().mean() / teacher.double().mean())


def psnr_gain_interval(
    student_error: Tensor,
    teacher_error: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Endpoint PSNR of the student minus the few-step teacher's, in dB, with its interval.

    Args:
        student_error, teacher_error: ``(P,)`` mean squared errors of each prompt's pictures against
            the same reference.
        confidence: mass inside the (percentile) interval.
        resamples: bootstrap draws of P prompts with replacement; both samplers get the same draw.
        seed: of the draws.

    Raises:
        ValueError: the prompts differ in number or are none, or confidence is not in (0, 1).
    """
    return _bootstrap(
        teacher_error,
        student_error,
        lambda ratio: 10 * torch.log10(ratio),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def diversity_ratio_interval(
    student: Tensor,
    teacher: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`diversity_ratio` of ``(P,)`` diversities with its interval; arguments as the PSNR gain's."""
    diversity_ratio(student, teacher)  # refuses a teacher without diversity
    return _bootstrap(
        student,
        teacher,
        lambda ratio: ratio,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def psnr_interval(error: Tensor) -> Interval:
    """Endpoint PSNR in dB of ``(P,)`` mean squared errors, with its 95 % interval over prompts."""
    return _bootstrap(error, torch.ones_like(error), psnr_of_error)


def mean_interval(values: Tensor) -> Interval:
    """Mean of ``(P,)`` values of prompts, with its 95 % interval over them."""
    return _bootstrap(values, torch.ones_like(values), lambda mean: mean)


def difference_interval(student: Tensor, other: Tensor) -> Interval:
    """Mean of ``(P,)`` values of prompts minus that of another's, with its paired 95 % interval.

    Raises:
        ValueError: the prompts differ in number or are none.
    """
    _check_pairs(student, other)
    return mean_interval(student.double() - other.double())


def _bootstrap(
    numerator: Tensor,
    denominator: Tensor,
    figure: Callable[[Tensor], Tensor],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over prompts of ``figure(sum(numerator) / sum(denominator))``."""
    _check_pairs(numerator, denominator)
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence must be in (0, 1) and resamples >= 1, got {confidence} and {resamples}"
        )
    numerator, denominator = numerator.double().cpu(), denominator.double().cpu()
    prompts = numerator.numel()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(prompts, (resamples, prompts), generator=generator)
    values = figure(numerator[draws].sum(1) / denominator[draws].sum(1))
    # nearest ranks, not interpolation: infinite draws (a perfect student) stay infinite, not NaN
    ordered = values.sort().values
    tail = (1 - confidence) / 2
    low = ordered[math.floor(tail * (resamples - 1))]
    high = ordered[math.ceil((1 - tail) * (resamples - 1))]
    return Interval(float(figure(numerator.sum() / denominator.sum())), float(low), float(high))


def _check_pairs(first: Tensor, second: Tensor) -> None:
    if first.dim() != 1 or first.shape != second.shape or first.numel() == 0:
        raise ValueError(
            "expected one value a prompt, (P,) and (P,) with P >= 1, got shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
