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
class ByPrompt:
    """A method's figures of each prompt, ``(P,)`` float64.

    Attributes:
        error: mean squared error of its pictures against the reference's.
        diversity: mean RMS distance between them.
        retrieval: share that shows the prompt's emoji; None: not measured.
    """

    error: Tensor
    diversity: Tensor
    retrieval: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """Everything measured.

    Attributes:
        noise: hash of each prompt's noise.
        by_prompt: the figures of each prompt by method name.
        pictures: (prompts, seeds, 3, H, W) in [-1, 1] by method name.
        files: name of each prompt's first picture in the pictures' folder, by method name.
    """

    prompts: tuple[str, ...]
    noise: tuple[str, ...]
    methods: tuple[MethodResult, ...]  # reference first, student last
    by_prompt: dict[str, ByPrompt]
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
    drawn = drawing.read()
    pictures = {name: item.pictures for name, item in drawn.items()}
    prompts, names = drawing.prompts, [method.name for method in drawing.methods]
    reference, few_steps, student = names[0], names[-2], names[-1]
    found = _retrieval_at_1(pictures, prompts, retrieve) if retrieve else {}
    by_prompt = {
        name: ByPrompt(
            # prompt by prompt: in float64, all at once would be twice what the pictures take
            torch.stack(
                [
                    squared_error(*pair).mean()
                    for pair in zip(some, pictures[reference], strict=True)
                ]
            ),
            pairwise_diversity(some),
            found.get(name),
        )
        for name, some in pictures.items()
    }
    error = {name: figures.error for name, figures in by_prompt.items()}
    diversity = {name: figures.diversity for name, figures in by_prompt.items()}
    return Evaluation(
        prompts=prompts,
        noise=drawing.noise,
        methods=_methods(drawing.methods, drawn, by_prompt),
        by_prompt=by_prompt,
        psnr_gain=psnr_gain_interval(error[student], error[few_steps]),
        diversity_ratio=diversity_ratio_interval(diversity[student], diversity[reference]),
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


def _methods(
    methods: Sequence[Method], drawn: dict[str, Drawn], by_prompt: dict[str, ByPrompt]
) -> tuple[MethodResult, ...]:
    """The headline table; the reference is its first row."""
    reference = by_prompt[methods[0].name].diversity.mean()
    rows = []
    for method in methods:
        figures = by_prompt[method.name]
        error, diversity = figures.error.mean(), figures.diversity.mean()
        rows.append(
            MethodResult(
                name=method.name,
                nfe=method.nfe,
                psnr=None if method is methods[0] else float(psnr_of_error(error)),
                diversity=float(diversity),
                diversity_ratio=float(diversity / reference),
                retrieval_at_1=None
                if figures.retrieval is None
                else float(figures.retrieval.mean()),
                seconds=drawn[method.name].seconds,
            )
        )
    return tuple(rows)


def _retrieval_at_1(
    pictures: dict[str, Tensor], prompts: Sequence[str], retrieve: Retrieve
) -> dict[str, Tensor]:
    """Each prompt's share of right pictures by method; all pictures go into one search."""
    everything = torch.cat([drawn.flatten(0, 1) for drawn in pictures.values()])
    seeds = next(iter(pictures.values())).shape[1]
    repeated = [prompt for prompt in prompts for _ in range(seeds)] * len(pictures)
    hits = retrieve(everything, repeated).double().unflatten(0, (len(pictures), -1, seeds)).mean(2)
    return dict(zip(pictures, hits, strict=True))
