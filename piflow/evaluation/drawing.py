"""Every method's pictures, from the same prompts and noise, by one process or several.

    rank 0        which pictures are missing  ── broadcast ──▶  all ranks
    rank r        batch r of each round: draws it, writes its PNG files
    all ranks     their lines of the index  ── gathered ──▶  rank 0, which alone writes the index

Pictures are drawn once: they are kept as PNG files under what decides them (recipe, store, method,
noise, for the student its checkpoint), and measured as those files hold them, with 8 bits a colour.
A video's file holds all its frames, one below the other, so that a figure is one of all frames.
Another call draws what is missing. Which pictures are drawn together follows from what is missing
and the batch size alone, so that the number of workers doesn't change any of them.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from piflow import storage
from piflow.backbones import Conditioning, build_codec
from piflow.config import Recipe
from piflow.data.batch import conditioning, cut_for
from piflow.data.reader import PromptStore
from piflow.data.select import evaluation_rows
from piflow.evaluation.others import Other
from piflow.flow import draw_noise
from piflow.inference.gallery import Entry, Gallery, Request
from piflow.inference.pixels import png_bytes, to_image
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.sampling import sample_euler, sample_few_step
from piflow.schedule import FewStep
from piflow.sharding.base import Strategy
from piflow.sharding.everyone import everyone, of_rank_0
from piflow.storage.picture import MAX_PICTURE_BYTES, MAX_PIXELS, open_picture
from piflow.training.step import micro_batch_generator

if TYPE_CHECKING:
    from piflow.evaluation.other_pipelines import OtherSampler

Item = TypeVar("Item")

Sampler = Callable[[Tensor, Conditioning], Tensor]
"""(noise (B, C, h, w), conditioning of B prompts) -> x0 latents, as the noise."""

Paint = Callable[[Sequence[Request]], list[Image]]
"""Pictures of some requests, on the device of whoever draws."""

_HELD_OUT = -1  # the noise's "step": training counts from 0, so no training noise is ever met


@dataclass(frozen=True)
class Method:
    """A way to get x0 from noise, and what it costs.

    Attributes:
        nfe: network evaluations a picture, one a step (guidance's second branch not counted).
        is_student: else the teacher in as many Euler steps.
        is_headline: whether it stands among the first things that a report shows; else it is a
            point of the curve over NFE.
        other: somebody else's model, neither teacher nor student.
    """

    name: str
    nfe: int
    is_student: bool = False
    is_headline: bool = True
    other: Other | None = None

    @property
    def is_teacher(self) -> bool:
        return not self.is_student and self.other is None

    @property
    def same_noise(self) -> bool:
        """Whether it starts from the reference's noise."""
        return self.other is None or self.other.same_noise


def methods_of(recipe: Recipe, others: Sequence[Other] = ()) -> list[Method]:
    """Every way that pictures are drawn.

    The reference comes first, then the teacher in twice the student's number of steps, the teacher
    at the numbers of `evaluation.nfe`, other people's models, and the student at those numbers; the
    last two are the teacher in as many steps as
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

    steps = [*headline, *(count for count in more if count not in headline)]
    return [
        *map(teacher, steps),
        *(Method(other.config.name, other.config.steps, other=other) for other in others),
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
        others: other people's models, each as `Other.to_json`.
    """

    recipe_hash: str
    rows: tuple[int, ...]
    folder: str
    checkpoint: str
    others: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        store: PromptStore,
        folder: str,
        checkpoint: str,
        others: Sequence[Other] = (),
        prompts: Sequence[str] = (),
    ) -> Plan:
        """The recipe's.

        Args:
            prompts: those of `evaluation.prompt_set`, which the store holds and no others.

        Raises:
            ValueError, OSError: as `evaluation_rows`.
        """
        if recipe.evaluation.prompt_set is None:
            rows = tuple(evaluation_rows(recipe, store.index()))
        else:  # all of its own store, whose rows have another order
            index = store.index()
            numbers = dict(zip(index["prompt"].to_pylist(), index["row"].to_pylist(), strict=True))
            rows = tuple(numbers[prompt] for prompt in prompts)
        told = tuple(other.to_json() for other in others)
        return cls(recipe.hash(), rows, storage.absolute(folder), checkpoint, told)


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
        self._conditions = batch.conditions  # of shapes of their own
        self._cond = conditioning(replace(batch, conditions=None), cpu, shared_by=shared_by)
        negative = store.negative_prompt(recipe.guidance.negative_prompt)
        self._negative = conditioning(negative, cpu, shared_by=shared_by)
        self._codec = build_codec(recipe.model)
        latent = self._codec.latent_shape(recipe.embed.height, recipe.embed.width)
        shape = (len(batch.prompts), recipe.evaluation.seeds, *latent)
        self._noise = draw_noise(shape, micro_batch_generator(recipe.seed, _HELD_OUT, 0))
        self.prompts = batch.prompts
        self.methods = methods_of(recipe, [Other.from_json(text) for text in plan.others])
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

    def rest_is_drawn(self, strategy: Strategy, advance: Callable[[int], None]) -> bool:
        """Whether no picture of teacher and student is missing; a collective.

        Args:
            advance: told of them, if so.
        """
        methods = [method for method in self.methods if method.other is None]
        own = strategy.rank == 0 and not any(
            self._gallery(method).missing(self._requests) for method in methods
        )
        if is_drawn := of_rank_0(own):
            advance(len(methods) * len(self._requests))
        return is_drawn

    def draw_others(
        self,
        strategy: Strategy,
        *,
        advance: Callable[[int], None] = lambda count: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Draw what is missing of other people's models; a collective of all workers.

        Each worker has a model whole, and one after the other: do so before teacher and student
        take the memory.

        Args, returns: as of `draw`.

        Raises:
            ValueError: a model doesn't load, or makes pictures of another size; on every worker.
        """
        from piflow.evaluation.other_pipelines import OtherSampler

        for method in self.methods:
            if method.other is None:
                continue
            missing = self._missing(method, strategy, advance)
            batches = list(_cut(missing, self._recipe.evaluation.batch_size))
            sampler, problem = None, None
            try:
                if strategy.rank < len(batches):
                    sampler = OtherSampler(method.other, strategy.device)
            except (ValueError, OSError) as error:
                problem = str(error)
            problem = next((text for text in everyone(problem) if text is not None), None)
            if problem is not None:
                raise ValueError(problem)
            paint = None if sampler is None else partial(self._paint_other, sampler)
            goes_on = self._deal(method, batches, paint, strategy, advance, stop, along=False)
            del sampler, paint
            if strategy.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            if not goes_on:
                return False
        return True

    @torch.no_grad()
    def draw(
        self,
        trio: Trio,
        strategy: Strategy,
        *,
        advance: Callable[[int], None] = lambda count: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Draw what is missing of teacher and student; a collective of all workers.

        Args:
            trio: teacher and the student to be measured, prepared by the strategy.
            advance: told on every worker how many more pictures are there.
            stop: asked after each round, on every worker; they answer alike.

        Returns:
            Whether all is drawn: nobody asked to stop before.
        """
        for method in self.methods:
            if method.other is not None:
                continue
            missing = self._missing(method, strategy, advance)
            batches = self._batches(missing)
            negative = self._negative.to(strategy.device)
            sampler = sampler_of(method, self._recipe, trio, negative)
            paint = partial(self._paint, sampler, strategy.device)
            along = strategy.splits_frozen
            if not self._deal(method, batches, paint, strategy, advance, stop, along=along):
                return False
        return True

    def _batches(self, missing: Sequence[Request]) -> list[Sequence[Request]]:
        """What is drawn together: neighbours whose pictures to edit, if any, have one shape."""
        shapes: dict[tuple[int, ...], list[Request]] = {}
        for request in missing:
            shape: tuple[int, ...] = ()
            if self._conditions is not None:
                shape = tuple(self._conditions[request.number - 1].shape)
            shapes.setdefault(shape, []).append(request)
        size = self._recipe.evaluation.batch_size
        return [batch for alike in shapes.values() for batch in _cut(alike, size)]

    def _missing(
        self, method: Method, strategy: Strategy, advance: Callable[[int], None]
    ) -> list[Request]:
        own = self._gallery(method).missing(self._requests) if strategy.rank == 0 else []
        missing: list[Request] = of_rank_0(own)
        advance(len(self._requests) - len(missing))
        return missing

    def _deal(
        self,
        method: Method,
        batches: Sequence[Sequence[Request]],
        paint: Paint | None,
        strategy: Strategy,
        advance: Callable[[int], None],
        stop: Callable[[], bool],
        *,
        along: bool,
    ) -> bool:
        """Draw a batch a worker, round by round; returns whether nobody asked to stop.

        Args:
            paint: None: this worker has no batch in any round.
            along: whether forward passes are collectives, so that a worker without a batch draws
                along, and throws away what comes of it.
        """
        gallery = self._gallery(method, strategy.device.type)
        try:
            for dealt in _cut(batches, strategy.world_size):
                mine = self._draw_one_of(dealt, paint, gallery, strategy, along)
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
        paint: Paint | None,
        gallery: Gallery,
        strategy: Strategy,
        along: bool,
    ) -> list[Entry]:
        """Draw and write this worker's batch of a round; returns its lines of the index."""
        has_own = strategy.rank < len(dealt)
        if paint is None or not (has_own or along):
            return []
        batch = dealt[strategy.rank if has_own else 0]
        began = time.perf_counter()
        images = paint(batch)
        if not has_own:
            return []
        seconds = (time.perf_counter() - began) / len(batch)
        return [
            gallery.write(request, png_bytes(image), seconds=seconds)
            for request, image in zip(batch, images, strict=True)
        ]

    def _paint(
        self, sampler: Sampler, device: torch.device, batch: Sequence[Request]
    ) -> list[Image]:
        rows = torch.tensor([request.number - 1 for request in batch])
        noise = self._noise_of(batch).to(device)
        cond = self._cond.select(rows)
        if self._conditions is not None:
            cond = cond.editing(torch.stack([self._conditions[row] for row in rows.tolist()]))
        latents = sampler(noise, cond.to(device))
        return [to_image(picture) for picture in self._codec.decode(latents)]

    def _paint_other(self, sampler: OtherSampler, batch: Sequence[Request]) -> list[Image]:
        prompts = [request.prompt for request in batch]
        digests = [request.noise for request in batch]
        size = (self._recipe.embed.height, self._recipe.embed.width)
        return sampler.draw(prompts, self._noise_of(batch), digests, size)

    def _noise_of(self, batch: Sequence[Request]) -> Tensor:
        rows = torch.tensor([request.number - 1 for request in batch])
        return self._noise[rows, torch.tensor([request.seed for request in batch])]

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
        embed = self._recipe.embed
        pixels = max(MAX_PIXELS, self._codec.frames * embed.height * embed.width)
        pictures = [read_picture(gallery.file(item), pixels) for item in self._requests]
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
        size = {"height": self._recipe.embed.height, "width": self._recipe.embed.width}
        if method.other is not None:
            settings = {"method": method.other.identity, **size}
            return Gallery(self._plan.folder, settings, {"device": device, "name": method.name})
        return Gallery(
            self._plan.folder,
            {
                "recipe": self._plan.recipe_hash,
                "manifest": self._manifest,
                "method": method.name,
                "checkpoint": self._plan.checkpoint if method.is_student else None,
                **size,
            },
            {"device": device},
        )


def _cut(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Neighbours, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _digest(noise: Tensor) -> str:
    return hashlib.sha256(noise.cpu().contiguous().numpy().tobytes()).hexdigest()


def read_picture(uri: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A PNG file as (3, H, W) float32 in [-1, 1]."""
    content = storage.read_bytes(uri, max_bytes=MAX_PICTURE_BYTES)
    picture = open_picture(content, max_pixels=max_pixels)
    levels = torch.from_numpy(np.array(picture.convert("RGB")))
    return levels.movedim(-1, 0).float() / 127.5 - 1
