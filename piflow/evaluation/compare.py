"""Compare the few-step student with its teacher, from the same prompts and noise.

Pictures are drawn once: they are kept as PNG files under what decides them (recipe, store, method,
noise, for the student its checkpoint), and measured as those files hold them, with 8 bits a colour.
Another call draws what is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piflow import storage
from piflow.backbones import Codec, Conditioning, build_codec
from piflow.config import Recipe
from piflow.data.batch import conditioning, cut_for
from piflow.data.reader import PromptStore
from piflow.data.select import evaluation_rows
from piflow.evaluation.metrics import (
    Interval,
    diversity_ratio_interval,
    pairwise_diversity,
    psnr_gain_interval,
    psnr_of_error,
    squared_error,
)
from piflow.evaluation.sheet import png_bytes, to_image
from piflow.flow import draw_noise
from piflow.inference.gallery import Gallery, Request
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FewStep
from piflow.storage.picture import open_picture
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
    steps = list(dict.fromkeys([reference, 2 * nfe, nfe]))  # no method twice
    return [teacher(count) for count in steps] + [Method(f"student, {nfe} NFE", nfe, student)]


@dataclass(frozen=True)
class Drawn:
    """A method's pictures.

    Attributes:
        pictures: (prompts, seeds, 3, H, W) in [-1, 1].
        seconds: wall time for all of them, whenever they were drawn.
        files: each prompt's first picture in the folder.
    """

    pictures: Tensor
    seconds: float
    files: tuple[str, ...]


@torch.no_grad()
def draw(
    method: Method,
    prompts: Sequence[str],
    cond: Conditioning,
    noise: Tensor,
    codec: Codec,
    gallery: Gallery,
    batch_size: int,
    advance: Callable[[int], None],
) -> Drawn:
    """Pictures from noise (prompts, seeds, C, h, w); those that the gallery has aren't drawn.

    Args:
        cond: of the prompts.
        advance: told the number of pictures done after each batch.
    """
    requests = [
        Request(row + 1, prompt, seed, _digest(noise[row, seed]))
        for row, prompt in enumerate(prompts)
        for seed in range(noise.shape[1])
    ]
    missing = gallery.missing(requests)
    advance(len(requests) - len(missing))
    try:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            rows = torch.tensor([request.number - 1 for request in batch])
            seeds = torch.tensor([request.seed for request in batch])
            began = time.perf_counter()
            latents = method.sample(noise[rows, seeds], cond.select(rows))
            images = [to_image(picture) for picture in codec.decode(latents)]
            seconds = (time.perf_counter() - began) / len(batch)
            for request, image in zip(batch, images, strict=True):
                gallery.add(request, png_bytes(image), seconds=seconds)
            advance(len(batch))
    finally:
        gallery.close()
    pictures = torch.stack([_read(gallery.file(request)) for request in requests])
    return Drawn(
        pictures.unflatten(0, noise.shape[:2]),
        sum(gallery.note(request, "seconds") for request in requests),
        tuple(gallery.name(request) for request in requests[:: noise.shape[1]]),
    )


def _digest(noise: Tensor) -> str:
    return hashlib.sha256(noise.cpu().contiguous().numpy().tobytes()).hexdigest()


def _read(uri: str) -> Tensor:
    """A PNG file as (3, H, W) float32 in [-1, 1]."""
    levels = torch.from_numpy(np.array(open_picture(storage.read_bytes(uri)).convert("RGB")))
    return levels.movedim(-1, 0).float() / 127.5 - 1


def evaluate(
    recipe: Recipe,
    trio: Trio,
    store: PromptStore,
    device: torch.device,
    folder: str,
    checkpoint: str,
    *,
    retrieve: Retrieve | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Draw with every method from the same held-out noise, and measure.

    Args:
        trio: teacher and the student to be measured.
        folder: URI of the pictures' folder.
        checkpoint: hash of the student's checkpoint.
        retrieve: finds the emoji nearest to each picture, for retrieval@1.
        advance: progress, in pictures.
    """
    batch = store.read(evaluation_rows(recipe, store.index()))
    shared_by = cut_for(recipe)
    cond = conditioning(batch, device, shared_by=shared_by)
    negative_prompt = store.negative_prompt(recipe.guidance.negative_prompt)
    negative = conditioning(negative_prompt, device, shared_by=shared_by)
    codec = build_codec(recipe.model)
    latent = codec.latent_shape(recipe.embed.height, recipe.embed.width)
    generator = micro_batch_generator(recipe.seed, _HELD_OUT, 0)
    shape = (len(batch.prompts), recipe.evaluation.seeds, *latent)
    noise = draw_noise(shape, generator, device)
    methods = build_methods(recipe, trio, negative)
    drawn = {}
    for method in methods:
        gallery = Gallery(
            folder,
            {
                "recipe": recipe.hash(),
                "manifest": store.manifest_hash,
                "method": method.name,
                "checkpoint": checkpoint if method is methods[-1] else None,
                "height": recipe.embed.height,
                "width": recipe.embed.width,
            },
            {"device": device.type},
        )
        drawn[method.name] = draw(
            method,
            batch.prompts,
            cond,
            noise,
            codec,
            gallery,
            recipe.evaluation.batch_size,
            advance,
        )
    return _measure(methods, drawn, batch.prompts, retrieve)


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
