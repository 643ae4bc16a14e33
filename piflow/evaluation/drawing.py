"""Every method's pictures, from the same prompts and noise, by one process or several.

    rank 0        which pictures are missing  ── broadcast ──▶  all ranks
    rank r        batch r of each round: draws it, writes its PNG files
    all ranks     their lines of the index  ── gathered ──▶  rank 0, which alone writes the index

Pictures are drawn once: they are kept as PNG files under what decides them (recipe, store, method,
noise, for the student its checkpoint), and measured as those files hold them, with 8 bits a colour.
Another call draws what is missing. Which pictures are drawn together follows from what is missing
and the batch size alone, so that the number of workers doesn't change any of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from piflow import storage
from piflow.backbones import Conditioning, build_codec
from piflow.config import Recipe
from piflow.data.batch import conditioning, cut_for
from piflow.data.reader import PromptStore
from piflow.data.select import evaluation_rows
from piflow.flow import draw_noise
from piflow.inference.gallery import Entry, Gallery, Request
from piflow.inference.pixels import png_bytes, to_image
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FewStep
from piflow.sharding.base import Strategy
from piflow.sharding.everyone import everyone, of_rank_0
from piflow.storage.picture import MAX_PICTURE_BYTES, open_picture
from piflow.training.step import micro_batch_generator

Item = TypeVar("Item")

Sampler = Callable[[Tensor, Conditioning], Tensor]
"""(noise (B, C, h, w), conditioning of B prompts) -> x0 latents, as the noise."""

_HELD_OUT = -1  # the noise's "step": training counts from 0, so no training noise is ever met


@dataclass(frozen=True)
class Method:
    """A way to get x0 from noise, and what it costs.

    Attributes:
        nfe: network evaluations a picture, one a step (guidance's second branch not counted).
        is_student: else the teacher in as many Euler steps.
        is_headline: whether it stands among the first things that a report shows; else it is a
            point of the curve over NFE.
    """

    name: str
    nfe: int
    is_student: bool = False
    is_headline: bool = True


def methods_of(recipe: Recipe) -> list[Method]:
    """Every way that pictures are drawn.

    The reference comes first, then the teacher in twice the student's number of steps, then teacher
    and student at the numbers of `evaluation.nfe`; the last two are the teacher in as many steps as
    the student was trained for, and the student.

    Raises:
        ValueError: the recipe distils nothing.
    """
    nfe = FewStep.of(recipe.distillation()).nfe
    more = sorted(set(recipe.evaluation.nfe) - {nfe})
    headline = dict.fromkeys([recipe.evaluation.teacher_steps, 2 * nfe])  # no method twice

    def teacher(steps: int) -> Method:
        name = f"teacher, {steps} Euler steps"
        return Method(name, steps, is_headline=steps in headline or steps == nfe)

    def student(count: int) -> Method:
        return Method(f"student, {count} NFE", count, True, is_headline=count == nfe)

    others = [count for count in more if count not in headline]
    return [
        *map(teacher, [*headline, *others]),
        *map(student, more),
        teacher(nfe),
        student(nfe),
    ]


def sampler_of(method: Method, recipe: Recipe, trio: Trio, negative: Conditioning) -> Sampler:
    """How a method draws.

    Args:
        negative: the negative prompt, for the teacher's guidance.
    """
    few_step = FewStep.of(recipe.distillation())

    def student(noise: Tensor, cond: Conditioning) -> Tensor:
        schedule = replace(few_step, nfe=method.nfe)
        return sample_few_step(lambda x, sigma: trio.student(x, sigma, cond), noise, schedule)

    def teacher(noise: Tensor, cond: Conditioning) -> Tensor:
        guided = GuidedTeacher(trio, cond, negative, recipe.guidance)
        return sample_euler(guided, noise, few_step.schedule, method.nfe)

    return student if method.is_student else teacher


@dataclass(frozen=True)
class Plan:
    """What an evaluation draws: plain values, the same for every process.

    Attributes:
        recipe_hash: of the recipe as it was written.
        rows: the prompts' numbers in the store.
        folder: URI of the pictures' folder, absolute.
        checkpoint: hash of the student's checkpoint.
    """

    recipe_hash: str
    rows: tuple[int, ...]
    folder: str
    checkpoint: str

    @classmethod
    def of(cls, recipe: Recipe, store: PromptStore, folder: str, checkpoint: str) -> Plan:
        """The recipe's.

        Raises:
            ValueError, OSError: as `evaluation_rows`.
        """
        rows = tuple(evaluation_rows(recipe, store.index()))
        return cls(recipe.hash(), rows, storage.absolute(folder), checkpoint)


@dataclass(frozen=True)
class Drawn:
    """What the index says of a method's pictures.

    Attributes:
        seconds: of drawing, whenever and by however many workers that was; theirs added up.
        seconds_a_picture: the median, of a picture's share of its batch's.
        files: name of each prompt's first picture in the folder.
    """

    seconds: float
    seconds_a_picture: float
    files: tuple[str, ...]


class Pictures(Mapping[str, Tensor]):
    """Every method's pictures by its name, ``(prompts, seeds, 3, H, W)`` in [-1, 1].

    They are read when they are asked for. The first method's, which all others are compared with,
    stay in memory, of the others those of one: pictures of many methods may be more than it holds.

    Args:
        readers: read a method's pictures.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = dict(readers)
        self._first = next(iter(self._readers), None)
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            kept = {key: value for key, value in self._kept.items() if key == self._first}
            self._kept = kept  # before the next ones are read
            self._kept = kept | {name: self._readers[name]()}
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


class Drawing:
    """The pictures of a plan.

    Args:
        recipe: its places may be absolute; the plan knows the hash as it was written.
        store: the recipe's, opened.
    """

    def __init__(self, recipe: Recipe, plan: Plan, store: PromptStore) -> None:
        self._recipe, self._plan, self._manifest = recipe, plan, store.manifest_hash
        cpu = torch.device("cpu")
        batch = store.read(list(plan.rows))
        # no workers share a batch here, however many do in training
        shared_by = None if cut_for(recipe) is None else 1
        self._cond = conditioning(batch, cpu, shared_by=shared_by)
        negative = store.negative_prompt(recipe.guidance.negative_prompt)
        self._negative = conditioning(negative, cpu, shared_by=shared_by)
        self._codec = build_codec(recipe.model)
        latent = self._codec.latent_shape(recipe.embed.height, recipe.embed.width)
        shape = (len(batch.prompts), recipe.evaluation.seeds, *latent)
        self._noise = draw_noise(shape, micro_batch_generator(recipe.seed, _HELD_OUT, 0))
        self.prompts = batch.prompts
        self.methods = methods_of(recipe)
        self._requests = [
            Request(row + 1, prompt, seed, _digest(self._noise[row, seed]))
            for row, prompt in enumerate(batch.prompts)
            for seed in range(shape[1])
        ]

    @property
    def noise(self) -> tuple[str, ...]:
        """Hash of the noise of each prompt's pictures, all seeds'."""
        seeds = self._noise.shape[1]
        digests = [request.noise for request in self._requests]
        groups = [digests[start : start + seeds] for start in range(0, len(digests), seeds)]
        return tuple(hashlib.sha256("".join(group).encode()).hexdigest() for group in groups)

    @property
    def total(self) -> int:
        """Pictures of all methods."""
        return len(self.methods) * len(self._requests)

    def num_missing(self) -> int:
        """Pictures that aren't there; those that are are read and compared."""
        return sum(len(self._gallery(item).missing(self._requests)) for item in self.methods)

    @torch.no_grad()
    def draw(
        self,
        trio: Trio,
        strategy: Strategy,
        *,
        advance: Callable[[int], None] = lambda count: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Draw what is missing; a collective of all workers of the strategy.

        Args:
            trio: teacher and the student to be measured, prepared by the strategy.
            advance: told on every worker how many more pictures are there.
            stop: asked after each round, on every worker; they answer alike.

        Returns:
            Whether all is drawn: nobody asked to stop before.
        """
        size, world = self._recipe.evaluation.batch_size, strategy.world_size
        for method in self.methods:
            gallery = self._gallery(method, strategy.device.type)
            own = gallery.missing(self._requests) if strategy.rank == 0 else []
            missing = of_rank_0(own)
            advance(len(self._requests) - len(missing))
            negative = self._negative.to(strategy.device)
            sampler = sampler_of(method, self._recipe, trio, negative)
            batches = list(_cut(missing, size))
            try:
                for dealt in _cut(batches, world):
                    mine = self._draw_one_of(dealt, sampler, gallery, strategy)
                    for entry in [entry for part in everyone(mine) for entry in part]:
                        if strategy.rank == 0:
                            gallery.enter(entry)
                    advance(sum(map(len, dealt)))
                    if stop():
                        return False
            finally:
                gallery.close()
        return True

    def _draw_one_of(
        self,
        dealt: Sequence[Sequence[Request]],
        sampler: Sampler,
        gallery: Gallery,
        strategy: Strategy,
    ) -> list[Entry]:
        """Draw and write this worker's batch of a round; returns its lines of the index.

        Where forward passes are collectives, a worker without a batch draws along, and throws away
        what comes of it.
        """
        has_own = strategy.rank < len(dealt)
        if not has_own and not strategy.splits_frozen:
            return []
        batch = dealt[strategy.rank if has_own else 0]
        rows = torch.tensor([request.number - 1 for request in batch])
        seeds = torch.tensor([request.seed for request in batch])
        began = time.perf_counter()
        noise = self._noise[rows, seeds].to(strategy.device)
        latents = sampler(noise, self._cond.select(rows).to(strategy.device))
        if not has_own:
            return []
        images = [to_image(picture) for picture in self._codec.decode(latents)]
        seconds = (time.perf_counter() - began) / len(batch)
        return [
            gallery.write(request, png_bytes(image), seconds=seconds)
            for request, image in zip(batch, images, strict=True)
        ]

    def read(self) -> tuple[dict[str, Drawn], Pictures]:
        """What is known of all pictures, and the pictures, by the methods' names.

        Raises:
            FileNotFoundError: some weren't drawn, or this process doesn't see them.
        """
        galleries = {method.name: self._gallery(method) for method in self.methods}
        drawn = {name: self._drawn(gallery) for name, gallery in galleries.items()}
        readers = {name: partial(self._pictures, gallery) for name, gallery in galleries.items()}
        return drawn, Pictures(readers)

    def _pictures(self, gallery: Gallery) -> Tensor:
        pictures = [read_picture(gallery.file(request)) for request in self._requests]
        return torch.stack(pictures).unflatten(0, self._noise.shape[:2])

    def _drawn(self, gallery: Gallery) -> Drawn:
        absent = [request for request in self._requests if not gallery.has(request)]
        if absent:
            raise FileNotFoundError(
                f"{self._plan.folder} lacks {len(absent)} of {len(self._requests)} pictures that "
                "were drawn: expected a folder that all workers' machines and this one see, on a "
                "shared disk or on s3://…"
            )
        seconds = [gallery.note(request, "seconds") for request in self._requests]
        first = self._requests[:: self._noise.shape[1]]
        return Drawn(sum(seconds), median(seconds), tuple(gallery.name(each) for each in first))

    def _gallery(self, method: Method, device: str = "") -> Gallery:
        return Gallery(
            self._plan.folder,
            {
                "recipe": self._plan.recipe_hash,
                "manifest": self._manifest,
                "method": method.name,
                "checkpoint": self._plan.checkpoint if method.is_student else None,
                "height": self._recipe.embed.height,
                "width": self._recipe.embed.width,
            },
            {"device": device},
        )


def _cut(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Neighbours, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _digest(noise: Tensor) -> str:
    return hashlib.sha256(noise.cpu().contiguous().numpy().tobytes()).hexdigest()


def read_picture(uri: str) -> Tensor:
    """A PNG file as (3, H, W) float32 in [-1, 1]."""
    picture = open_picture(storage.read_bytes(uri, max_bytes=MAX_PICTURE_BYTES))
    levels = torch.from_numpy(np.array(picture.convert("RGB")))
    return levels.movedim(-1, 0).float() / 127.5 - 1
