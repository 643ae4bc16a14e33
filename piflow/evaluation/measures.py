"""How each metric of `piflow.config.metrics` is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.config.metrics import METRICS
from piflow.evaluation.metrics import pairwise_diversity, squared_error

Retrieve = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures (B, 3, H, W), their prompts) -> whether each shows its prompt, (B,) bool."""


@dataclass(frozen=True)
class Material:
    """What metrics measure.

    Attributes:
        prompts: P texts.
        pictures: ``(P, S, 3, H, W)`` in [-1, 1] by method, the reference first.
        retrieve: finds the emoji nearest to each picture; None: nobody asked for it.
    """

    prompts: tuple[str, ...]
    pictures: Mapping[str, Tensor]
    retrieve: Retrieve | None = None

    @property
    def reference(self) -> Tensor:
        return next(iter(self.pictures.values()))


Measure = Callable[[Material], dict[str, dict[str, Tensor]]]
"""A metric: column -> method -> its values, ``(P,)`` or ``()`` float64. A method may be left out
that the column says nothing of.
"""


def measured(names: Sequence[str], material: Material) -> dict[str, dict[str, Tensor]]:
    """The columns of each method, by the metrics of these names."""
    columns: dict[str, dict[str, Tensor]] = {name: {} for name in material.pictures}
    for name in names:
        for column, by_method in MEASURES[name](material).items():
            for method, values in by_method.items():
                columns[method][column] = values
    return columns


def identities(names: Sequence[str]) -> dict[str, str]:
    """What decides each metric beside the pictures, in words."""
    return {name: f"version {METRICS[name].version}" for name in names}


def _psnr(material: Material) -> dict[str, dict[str, Tensor]]:
    # prompt by prompt: in float64, all at once would be twice what the pictures take
    return {
        "error": {
            name: torch.stack(
                [squared_error(*pair).mean() for pair in zip(some, material.reference, strict=True)]
            )
            for name, some in material.pictures.items()
        }
    }


def _diversity(material: Material) -> dict[str, dict[str, Tensor]]:
    return {
        "diversity": {name: pairwise_diversity(some) for name, some in material.pictures.items()}
    }


def _retrieval(material: Material) -> dict[str, dict[str, Tensor]]:
    """Each prompt's share of right pictures; all methods' pictures go into one search."""
    if material.retrieve is None:
        return {}
    pictures = material.pictures
    everything = torch.cat([drawn.flatten(0, 1) for drawn in pictures.values()])
    seeds = material.reference.shape[1]
    repeated = [prompt for prompt in material.prompts for _ in range(seeds)] * len(pictures)
    hits = material.retrieve(everything, repeated).double()
    shares = hits.unflatten(0, (len(pictures), -1, seeds)).mean(2)
    return {"retrieval": dict(zip(pictures, shares, strict=True))}


MEASURES: dict[str, Measure] = {
    "psnr": _psnr,
    "diversity": _diversity,
    "retrieval_at_1": _retrieval,
}
"""Every metric by its name."""
