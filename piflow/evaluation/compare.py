"""Compare the few-step student with its teacher, from the same prompts and noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.backbones import Codec, Conditioning, build_codec
from piflow.config import Recipe
from piflow.data.batch import conditioning
from piflow.data.reader import PromptStore
from piflow.data.select import evaluation_rows
from piflow.evaluation.metrics import (
    Interval,
    diversity_ratio_interval,
    endpoint_psnr,
    pairwise_diversity,
    psnr_gain_interval,
    psnr_of_error,
    squared_error,
)
from piflow.flow import draw_noise
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FewStep
from piflow.training.step import micro_batch_generator

Sampler = Callable[[Tensor, Conditioning], Tensor]

Retrieve = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures (B, 3, H, W), their prompts) -> whether each shows its prompt, (B,) bool."""

_HELD_OUT = -1  # the noise's "step": training counts from 0, so no training noise is ever met


@dataclass(frozen=True)
class Method:
    """A way to get x0 from noise, and what it costs."""

    name: str
    nfe: int
    sample: Sampler


@dataclass(frozen=True)
class MethodResult:
    """One row of the headline table: a sampler on all evaluation prompts and seeds."""

    name: str  # "teacher, 32 Euler steps"
    nfe: int  # network evaluations a picture, one a step (guidance's second branch not counted)
    psnr: float | None  # dB against the reference, of the mean squared error; None: the reference
    diversity: float  # mean pairwise RMS distance between a prompt's pictures
    diversity_ratio: float  # over the reference's diversity
    retrieval_at_1: float | None  # in [0, 1]; None: not measured
    seconds: float  # wall time for all pictures


@dataclass(frozen=True)
class PromptResult:
    """One prompt's PSNR in dB against the reference, of its pictures' mean squared error."""

    prompt: str
    psnr_teacher: float  # at the student's number of steps
    psnr_student: float


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; pictures are (prompts, seeds, 3, H, W) in [-1, 1] by method name."""

    prompts: tuple[str, ...]
    methods: tuple[MethodResult, ...]  # reference first, student last
    psnr_gain: Interval
    diversity_ratio: Interval
    per_prompt: tuple[PromptResult, ...]
    pictures: dict[str, Tensor]


def build_methods(recipe: Recipe, trio: Trio, negative: Conditioning) -> list[Method]:
    """The teacher at reference, doubled and the student's own number of steps, then the student.

    Raises:
        ValueError: the recipe distils nothing.
    """
    few_step = FewStep.of(recipe.distillation())
    nfe = few_step.nfe

    def teacher(steps: int) -> Method:
        def sample(noise: Tensor, cond: Conditioning) -> Tensor:
            guided = GuidedTeacher(trio, cond, negative, recipe.guidance)
            return sample_euler(guided, noise, few_step.schedule, steps)

        return Method(f"teacher, {steps} Euler steps", steps, sample)

    def student(noise: Tensor, cond: Conditioning) -> Tensor:
        return sample_few_step(lambda x, sigma: trio.student(x, sigma, cond), noise, few_step)

    reference = recipe.evaluation.teacher_steps
    if reference <= nfe:
        raise ValueError(
            f"evaluation.teacher_steps = {reference}, the reference, must exceed the student's "
            f"objective.nfe = {nfe}; take 32 or more"
        )
    steps = list(dict.fromkeys([reference, 2 * nfe, nfe]))  # no method twice
    return [teacher(count) for count in steps] + [Method(f"student, {nfe} NFE", nfe, student)]


@torch.no_grad()
def draw(
    method: Method,
    cond: Conditioning,
    noise: Tensor,
    codec: Codec,
    batch_size: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Pictures (prompts, seeds, 3, H, W) from noise (prompts, seeds, C, h, w).

    Args:
        advance: told the number of pictures done after each batch.
    """
    prompts, seeds = noise.shape[:2]
    rows = torch.arange(prompts).repeat_interleave(seeds)
    pictures = []
    for part, some in zip(
        noise.flatten(0, 1).split(batch_size), rows.split(batch_size), strict=True
    ):
        latents = method.sample(part, cond.select(some))
        pictures.append(codec.decode(latents).clamp(-1, 1).cpu())
        advance(len(part))
    return torch.cat(pictures).unflatten(0, (prompts, seeds))


def evaluate(
    recipe: Recipe,
    trio: Trio,
    store: PromptStore,
    device: torch.device,
    *,
    retrieve: Retrieve | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Draw with every method from the same held-out noise, and measure.

    Args:
        trio: teacher and the student to be measured.
        retrieve: finds the emoji nearest to each picture, for retrieval@1.
        advance: progress, in pictures.
    """
    batch = store.read(evaluation_rows(recipe, store.index()))
    cond = conditioning(batch, device)
    negative = conditioning(store.negative_prompt(recipe.guidance.negative_prompt), device)
    codec = build_codec(recipe.model)
    latent = codec.latent_shape(recipe.embed.height, recipe.embed.width)
    generator = micro_batch_generator(recipe.seed, _HELD_OUT, 0)
    shape = (len(batch.prompts), recipe.evaluation.seeds, *latent)
    noise = draw_noise(shape, generator, device)
    methods = build_methods(recipe, trio, negative)
    pictures, seconds = {}, {}
    for method in methods:
        began = time.perf_counter()
        pictures[method.name] = draw(
            method, cond, noise, codec, recipe.evaluation.batch_size, advance
        )
        seconds[method.name] = time.perf_counter() - began
    return _measure(methods, pictures, seconds, batch.prompts, retrieve)


def _measure(
    methods: Sequence[Method],
    pictures: dict[str, Tensor],
    seconds: dict[str, float],
    prompts: tuple[str, ...],
    retrieve: Retrieve | None,
) -> Evaluation:
    reference = pictures[methods[0].name]
    few_steps, student = methods[-2].name, methods[-1].name
    diversity = {name: pairwise_diversity(drawn) for name, drawn in pictures.items()}
    error = {
        name: squared_error(drawn.flatten(0, 1), reference.flatten(0, 1))
        .unflatten(0, drawn.shape[:2])
        .mean(1)
        for name, drawn in pictures.items()
    }
    found = _retrieval_at_1(pictures, prompts, retrieve) if retrieve else {}
    results = tuple(
        MethodResult(
            name=method.name,
            nfe=method.nfe,
            psnr=None if method is methods[0] else endpoint_psnr(drawn, reference),
            diversity=float(diversity[method.name].mean()),
            diversity_ratio=float(
                diversity[method.name].mean() / diversity[methods[0].name].mean()
            ),
            retrieval_at_1=found.get(method.name),
            seconds=seconds[method.name],
        )
        for method, drawn in ((method, pictures[method.name]) for method in methods)
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
