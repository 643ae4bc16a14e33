"""Measure the few-step student against its teacher, by the pictures of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.evaluation.drawing import Drawing, Drawn, Method
from piflow.evaluation.metrics import (
    Interval,
    diversity_ratio_interval,
    pairwise_diversity,
    psnr_gain_interval,
    psnr_of_error,
    squared_error,
)

Retrieve = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures (B, 3, H, W), their prompts) -> whether each shows its prompt, (B,) bool."""


@dataclass(frozen=True)
class MethodResult:
    """One row of the headline table: a sampler on all evaluation prompts and seeds."""

    name: str  # "teacher, 32 Euler steps"
    nfe: int  # as of `Method`
    psnr: float | None  # dB against the reference, of the mean squared error; None: the reference
    diversity: float  # mean pairwise RMS distance between a prompt's pictures
    diversity_ratio: float  # over the reference's diversity
    retrieval_at_1: float | None  # in [0, 1]; None: not measured
    seconds: float  # as of `Drawn`


@dataclass(frozen=True)
class PromptResult:
    """One prompt's PSNR in dB against the reference, of its pictures' mean squared error."""

    prompt: str
    psnr_teacher: float  # at the student's number of steps
    psnr_student: float


@dataclass(frozen=True)
class Evaluation:
    """Everything measured.

    Attributes:
        pictures: (prompts, seeds, 3, H, W) in [-1, 1] by method name.
        files: name of each prompt's first picture in the pictures' folder, by method name.
    """

    prompts: tuple[str, ...]
    methods: tuple[MethodResult, ...]  # reference first, student last
    psnr_gain: Interval
    diversity_ratio: Interval
    per_prompt: tuple[PromptResult, ...]
    pictures: dict[str, Tensor]
    files: dict[str, tuple[str, ...]]


def measure(drawing: Drawing, *, retrieve: Retrieve | None = None) -> Evaluation:
    """All figures of pictures that are drawn.

    Args:
        retrieve: finds the emoji nearest to each picture, for retrieval@1.

    Raises:
        FileNotFoundError: pictures are missing.
    """
    return _measure(drawing.methods, drawing.read(), drawing.prompts, retrieve)


def _measure(
    methods: Sequence[Method],
    drawn: dict[str, Drawn],
    prompts: tuple[str, ...],
    retrieve: Retrieve | None,
) -> Evaluation:
    pictures = {name: item.pictures for name, item in drawn.items()}
    reference = pictures[methods[0].name]
    few_steps, student = methods[-2].name, methods[-1].name
    diversity = {name: pairwise_diversity(some) for name, some in pictures.items()}
    # prompt by prompt: in float64, all at once would be twice what the pictures take
    error = {
        name: torch.stack(
            [squared_error(*pair).mean() for pair in zip(some, reference, strict=True)]
        )
        for name, some in pictures.items()
    }
    found = _retrieval_at_1(pictures, prompts, retrieve) if retrieve else {}
    results = tuple(
        MethodResult(
            name=method.name,
            nfe=method.nfe,
            psnr=None if method is methods[0] else float(psnr_of_error(error[method.name].mean())),
            diversity=float(diversity[method.name].mean()),
            diversity_ratio=float(
                diversity[method.name].mean() / diversity[methods[0].name].mean()
            ),
            retrieval_at_1=found.get(method.name),
            seconds=drawn[method.name].seconds,
        )
        for method in methods
    )
    return Evaluation(
        prompts=prompts,
        methods=results,
        psnr_gain=psnr_gain_interval(error[student], error[few_steps]),
        diversity_ratio=diversity_ratio_interval(diversity[student], diversity[methods[0].name]),
        per_prompt=tuple(
            PromptResult(prompt, float(teacher_psnr), float(student_psnr))
            for prompt, teacher_psnr, student_psnr in zip(
                prompts,
                psnr_of_error(error[few_steps]),
                psnr_of_error(error[student]),
                strict=True,
            )
        ),
        pictures=pictures,
        files={name: item.files for name, item in drawn.items()},
    )


def _retrieval_at_1(
    pictures: dict[str, Tensor], prompts: Sequence[str], retrieve: Retrieve
) -> dict[str, float]:
    """Share of right pictures by method; all methods' pictures go into one search."""
    everything = torch.cat([drawn.flatten(0, 1) for drawn in pictures.values()])
    seeds = next(iter(pictures.values())).shape[1]
    repeated = [prompt for prompt in prompts for _ in range(seeds)] * len(pictures)
    hits = retrieve(everything, repeated).float().unflatten(0, (len(pictures), -1)).mean(1)
    return dict(zip(pictures, hits.tolist(), strict=True))
