"""How each metric of `piflow.config.metrics` is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from piflow.config.metrics import METRICS, Network
from piflow.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from piflow.evaluation.feature_cache import cached_features, keep_features
from piflow.evaluation.metrics import pairwise_diversity, squared_error
from piflow.evaluation.networks import FeatureNetwork, Instruments
from piflow.evaluation.references import References
from piflow.inference.drawing import choose_device
from piflow.inference.pixels import to_image

Retrieve = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures (B, 3, H, W), their prompts) -> whether each shows its prompt, (B,) bool."""


class Material:
    """What metrics measure.

    Args:
        prompts: P texts.
        pictures: ``(P, S, 3, H, W)`` in [-1, 1] by method, the reference first.
        retrieve: finds the emoji nearest to each picture; None: nobody asked for it.
        instruments: networks and references; None: nobody asked for those.
        advance: told how many more pictures a network has seen.
        other_noise: methods whose pictures start from other noise than the reference's.
    """

    def __init__(
        self,
        prompts: tuple[str, ...],
        pictures: Mapping[str, Tensor],
        retrieve: Retrieve | None = None,
        instruments: Instruments | None = None,
        advance: Callable[[int], None] = lambda count: None,
        other_noise: Collection[str] = (),
    ) -> None:
        self.prompts, self.pictures, self.retrieve = prompts, pictures, retrieve
        self.other_noise = frozenset(other_noise)
        self._advance = advance
        self._instruments = instruments or Instruments({}, None)
        self._loaded: dict[Network, FeatureNetwork] = {}
        self._features: dict[Network, dict[str, Tensor]] = {}
        self._of_references: dict[Network, Tensor] = {}

    @property
    def reference(self) -> Tensor:
        return next(iter(self.pictures.values()))

    def network(self, kind: Network) -> FeatureNetwork:
        """A network, on a GPU if there is one; loaded once.

        Raises:
            ValueError: it doesn't load.
        """
        if kind not in self._loaded:
            self._loaded[kind] = self._instruments.networks[kind].load(choose_device("auto"))
        return self._loaded[kind]

    def features(self, kind: Network) -> dict[str, Tensor]:
        """Features of each method's pictures, ``(P, S, D)`` float64; computed once."""
        if kind not in self._features:
            self._features[kind] = {
                method: self.network(kind)
                .pictures(map(to_image, some.flatten(0, 1)), self._advance)
                .unflatten(0, some.shape[:2])
                for method, some in self.pictures.items()
            }
        return self._features[kind]

    def features_of_references(self, kind: Network) -> Tensor:
        """Features of the recipe's references, ``(N, D)`` float64; computed once a machine.

        Raises:
            ValueError: a picture can't be used.
        """
        references = self._instruments.references
        if references is None:
            raise ValueError("expected evaluation.references, got none")
        if kind not in self._of_references:
            self._of_references[kind] = self._kept_or_computed(kind, references)
        return self._of_references[kind]

    def _kept_or_computed(self, kind: Network, references: References) -> Tensor:
        stamp, network = references.stamp(), self._instruments.networks[kind].identity
        kept = cached_features(stamp, network)
        if kept is not None and len(kept[0]) == len(references):
            references.found_as(kept[1])
            self._advance(len(references))
            return kept[0]
        features = self.network(kind).pictures(references.read(), self._advance)
        keep_features(stamp, network, features, references.identity)
        return features

    def identities(self, names: Sequence[str]) -> dict[str, str]:
        """What decided each metric beside the pictures, in words, once they were measured."""
        return {name: self._identity(name) for name in names}

    def _identity(self, name: str) -> str:
        metric = METRICS[name]
        parts = [identity(name)]
        if metric.network is not None:
            opened = self._instruments.networks[metric.network]
            parts.append(f"{metric.network} {opened.identity[:16]}")
        if any(column.kind == "whole" for column in metric.columns.values()):
            parts.append(f"{self.reference.shape[0] * self.reference.shape[1]} pictures")
        if metric.references and self._instruments.references is not None:
            references = self._instruments.references
            parts.append(f"to {len(references)} references {references.identity[:16]}")
        return ", ".join(parts)


def identity(name: str) -> str:
    """What decides a metric that needs no network, in words."""
    return f"version {METRICS[name].version}"


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


def _psnr(material: Material) -> dict[str, dict[str, Tensor]]:
    # prompt by prompt: in float64, all at once would be twice what the pictures take
    return {
        "error": {
            name: torch.stack(
                [squared_error(*pair).mean() for pair in zip(some, material.reference, strict=True)]
            )
            for name, some in material.pictures.items()
            if name not in material.other_noise
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


def _cosines(
    material: Material, kind: Literal["clip", "pick_score", "hps_v2"]
) -> dict[str, Tensor]:
    """Of each method's pictures with their prompts, ``(P, S)``."""
    prompts = F.normalize(material.network(kind).prompts(material.prompts), dim=-1)
    return {
        method: (F.normalize(features, dim=-1) * prompts[:, None]).sum(-1)
        for method, features in material.features(kind).items()
    }


def _clip_score(material: Material) -> dict[str, dict[str, Tensor]]:
    """Mean of max(0, 100 cos) over each prompt's pictures.

    Hessel et al. 2021 (arXiv:2104.08718), with torchmetrics' factor of 100.
    """
    cosines = _cosines(material, "clip")
    return {
        "clip_score": {name: (100 * each).clamp(min=0).mean(1) for name, each in cosines.items()}
    }


def _pick_score(material: Material) -> dict[str, dict[str, Tensor]]:
    """Mean of exp(logit_scale) cos over each prompt's pictures.

    Kirstain et al. 2023 (arXiv:2305.01569), section 4; the scale is the network's own.
    """
    cosines, scale = _cosines(material, "pick_score"), material.network("pick_score").scale
    return {"pick_score": {name: (scale * each).mean(1) for name, each in cosines.items()}}


def _hps_v2(material: Material) -> dict[str, dict[str, Tensor]]:
    """Mean of 100 cos over each prompt's pictures.

    Wu et al. 2023 (arXiv:2306.09341), whose tables have this factor.
    """
    cosines = _cosines(material, "hps_v2")
    return {"hps_v2": {name: (100 * each).mean(1) for name, each in cosines.items()}}


def _dinov2_diversity(material: Material) -> dict[str, dict[str, Tensor]]:
    """Mean of 1 - cos over all pairs of a prompt's pictures."""
    diversity = {}
    for method, features in material.features("dinov2").items():
        unit, seeds = F.normalize(features, dim=-1), features.shape[1]
        cosines = (unit.sum(1).square().sum(-1) - seeds) / (seeds * (seeds - 1))
        diversity[method] = (1 - cosines).clamp(min=0)
    return {"dinov2_diversity": diversity}


def _dinov2_distance_teacher(material: Material) -> dict[str, dict[str, Tensor]]:
    """Mean of 1 - cos between a picture and the reference's of the same prompt and noise.

    The reference's to itself is 0, and pictures from other noise have no counterpart.
    """
    features = material.features("dinov2")
    reference = next(iter(features))
    unit = F.normalize(features[reference], dim=-1)
    distances = {
        name: (1 - (F.normalize(own, dim=-1) * unit).sum(-1)).clamp(min=0).mean(1)
        for name, own in features.items()
        if name not in material.other_noise
    }
    distances[reference] = torch.zeros_like(distances[reference])  # but for rounding
    return {"dinov2_distance_teacher": distances}


def _distance(
    columns: Sequence[str], compute: Callable[[Tensor, Tensor], Sequence[Tensor]]
) -> tuple[Measure, Measure]:
    """A metric of sets of DINOv2's features, to the teacher's reference and to the world's.

    The reference itself is compared with the world alone.
    """

    def to_teacher(material: Material) -> dict[str, dict[str, Tensor]]:
        (_, reference), *methods = material.features("dinov2").items()
        return measured_to(reference.flatten(0, 1), dict(methods), "_teacher")

    def to_references(material: Material) -> dict[str, dict[str, Tensor]]:
        others = material.features_of_references("dinov2")
        return measured_to(others, material.features("dinov2"), "")

    def measured_to(
        others: Tensor, methods: Mapping[str, Tensor], end: str
    ) -> dict[str, dict[str, Tensor]]:
        found = {name: compute(own.flatten(0, 1), others) for name, own in methods.items()}
        return {
            f"{column}{end}": {name: values[number] for name, values in found.items()}
            for number, column in enumerate(columns)
        }

    return to_teacher, to_references


_FD = _distance(["fd_dinov2"], lambda own, others: [frechet_distance(own, others)])
_KD = _distance(["kd_dinov2"], lambda own, others: [kernel_distance(own, others)])
_PR = _distance(["precision_dinov2", "recall_dinov2"], precision_recall)

MEASURES: dict[str, Measure] = {
    "psnr": _psnr,
    "diversity": _diversity,
    "retrieval_at_1": _retrieval,
    "clip_score": _clip_score,
    "pick_score": _pick_score,
    "hps_v2": _hps_v2,
    "dinov2_diversity": _dinov2_diversity,
    "dinov2_distance_teacher": _dinov2_distance_teacher,
    "fd_dinov2_teacher": _FD[0],
    "fd_dinov2": _FD[1],
    "kd_dinov2_teacher": _KD[0],
    "kd_dinov2": _KD[1],
    "precision_recall_dinov2_teacher": _PR[0],
    "precision_recall_dinov2": _PR[1],
}
"""Every metric by its name."""
