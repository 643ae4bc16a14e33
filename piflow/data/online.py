"""Online mode: no store; prompts are encoded while training runs, and the batches are a store's.

::

    encoding actor: row groups in order of need --> Ray Data: encoder actors (min..max)
      |  hands each out to every rank, once      <-- encoded row groups, as a store holds them
    ranks: pick their rows of each step, decode     (`TrainStream`)

The order is planned from the prompts alone, as if their store were there. Unit of encoding is the
row group, as it is in `piflow embed`: the same prompts go through the encoder together and are
rounded in the same way, so that a batch is the store's to the bit. A row group is encoded when the
first step needs it, once an epoch whatever the number of ranks, and dropped after the last; what
lies wholly before the step that a run resumes at is never encoded.

A few prompts are embedded ahead, into a small store of their own: the empty and the negative one,
and those of the pictures that are drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from piflow.config import Recipe
from piflow.data.background import ahead, quiet_context, remote_cause
from piflow.data.blocks import StreamPlan, with_replaced
from piflow.data.encode import load_encoder, on_encoders, what_failed
from piflow.data.layout import Layout, recipe_prompts, store_layout
from piflow.data.manifest import StoreError, StoreInputs
from piflow.data.order import PlannedStep, RowGroups, StreamOrder
from piflow.data.prompt_set import set_recipe
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.reader import EmbeddingStore, PromptStore, rows_by_hash, take_rows
from piflow.data.rows import EmbeddingBatch, decoded, encoded_table

if TYPE_CHECKING:
    from numpy.typing import NDArray


SAMPLE_PROMPTS = 4  # of the pictures drawn along a run, those with the smallest ids

_OBJECT_STORE_BYTES = 1024 * 2**20  # encoded row groups that wait in Ray's object store


def open_store(recipe: Recipe, *, evaluation: bool = False) -> PromptStore:
    """The store that a recipe's run reads; in online mode one that is only planned.

    Args:
        evaluation: whether the evaluation prompts are read, or those of a run's pictures.

    Raises:
        StoreError: no store, or a damaged one.
        ValueError: in online mode, as `recipe_prompts`.
    """
    if recipe.embed.mode == "store":
        return EmbeddingStore.open(recipe.embed.store, recipe.training.damaged_rows)
    prompts = recipe_prompts(recipe)
    small = EmbeddingStore.open(small_recipe(recipe, prompts, evaluation=evaluation)[0].embed.store)
    return OnlineStore(small, store_layout(recipe, prompts, small.manifest.encoder))


class OnlineStore:
    """The store that a recipe's prompts would make: where its rows lie, and a few embeddings.

    Args:
        small: the store of the prompts that are embedded ahead.
        layout: of all prompts.
    """

    def __init__(self, small: EmbeddingStore, layout: Layout) -> None:
        self.uri = small.uri
        self.layout = layout
        self._small = small
        self.empty_prompt = small.empty_prompt
        self.negative_prompt = small.negative_prompt
        self.require_encoder = small.require_encoder
        self.require_latents = small.require_latents
        self.require_conditions = small.require_conditions
        self.require_negative_prompt = small.require_negative_prompt

    @property
    def manifest_hash(self) -> str:
        """Hex sha256 of everything that the embeddings follow from."""
        return self.layout.inputs.digest

    def index(self) -> pa.Table:
        """``row``, ``prompt_id``, ``prompt``, ``height``, ``width`` of all prompts."""
        return _index([prompt for plan in self.layout.shards for prompt in plan.prompts])

    def lengths(self) -> NDArray[np.int32]:
        """Bytes of all prompts."""
        prompts = (prompt for plan in self.layout.shards for prompt in plan.prompts)
        return np.array([len(prompt.text.encode()) for prompt in prompts], np.int32)

    def read(self, rows: Sequence[int]) -> EmbeddingBatch:
        """Decode rows that were embedded ahead.

        Raises:
            StoreError: one of them wasn't.
        """
        ids = self.index()["prompt_id"].take(pa.array(rows)).to_pylist()
        places = {name: n for n, name in enumerate(self._small.index()["prompt_id"].to_pylist())}
        if missing := [name for name in ids if name not in places]:
            raise StoreError(
                f"prompt {missing[0]} isn't among those that {self.uri} holds for pictures; run "
                "`piflow embed` with this recipe"
            )
        return self._small.read([places[name] for name in ids])

    def first_by_hash(self, count: int) -> EmbeddingBatch:
        """The ``count`` prompts with the smallest ids, which were embedded ahead."""
        return self.read(rows_by_hash(self.index())[:count].tolist())


def _index(prompts: Sequence[Prompt]) -> pa.Table:
    columns = {
        "row": pa.array(range(len(prompts)), pa.int64()),
        "prompt_id": [prompt.prompt_id for prompt in prompts],
        "prompt": [prompt.text for prompt in prompts],
        "height": [prompt.height for prompt in prompts],
        "width": [prompt.width for prompt in prompts],
    }
    return pa.table(columns)


def small_recipe(recipe: Recipe, prompts: PromptSet, *, evaluation: bool) -> tuple[Recipe, bytes]:
    """The recipe of the small store, and the content of its prompts' file.

    Its folder, in `embed.store`, is named by the prompts.
    """
    if evaluation:
        from piflow.data.select import evaluation_rows

        index = _index(prompts.prompts)
        chosen = [prompts.prompts[row] for row in evaluation_rows(recipe, index)]
    else:
        chosen = sorted(prompts.prompts, key=lambda prompt: prompt.prompt_id)[:SAMPLE_PROMPTS]
    return set_recipe(recipe, PromptSet(tuple(chosen), 0), recipe.embed.store, "pictures")


class Visit(NamedTuple):
    """A row group in an epoch."""

    epoch: int
    group: int  # numbered through all shards


@dataclass(frozen=True)
class Needs:
    """Visits that a step is the first, and the last, to need."""

    opened: tuple[Visit, ...]
    closed: tuple[Visit, ...]


def needs(order: StreamOrder, groups: RowGroups, steps: range) -> Iterator[Needs]:
    """What each of the steps needs of all ranks' row groups; the same on every rank."""
    left: dict[Visit, int] = {}  # rows that later steps need
    first: dict[int, int] = {}  # each bucket's place in its sequence when the steps begin
    for step in steps:
        bucket, place = order.place(step)
        first.setdefault(bucket, place)
        rows = order.rows(bucket, place, order.batch_size)
        epochs = np.arange(place, place + order.batch_size) // order.bucket_rows(bucket)
        found = [
            Visit(*pair) for pair in zip(epochs.tolist(), groups.of(rows).tolist(), strict=True)
        ]
        opened = tuple(visit for visit in dict.fromkeys(found) if visit not in left)
        for visit in opened:
            left[visit] = _rows_from(order, groups, bucket, first[bucket], visit)
        for visit in found:
            left[visit] -= 1
        closed = tuple(visit for visit in dict.fromkeys(found) if not left[visit])
        for visit in closed:
            del left[visit]
        yield Needs(opened, closed)


def _rows_from(order: StreamOrder, groups: RowGroups, bucket: int, place: int, visit: Visit) -> int:
    """How many of a visit's rows come at a place of the bucket's sequence or later."""
    begin = visit.epoch * order.bucket_rows(bucket)
    total = int(groups.sizes[visit.group])
    if begin >= place:
        return total
    before = groups.of(order.rows(bucket, begin, place - begin))
    return total - int((before == visit.group).sum())


class RowGroupEncoder:
    """The encoding actor: one for all ranks of an attempt. Row groups are numbered by need.

    Args:
        recipe: with absolute paths.
        store: the run's planned store, with all prompts.
        steps: first step and end.
        num_ranks: how many will take each row group.
    """

    def __init__(
        self, recipe: Recipe, store: PromptStore, steps: tuple[int, int], num_ranks: int
    ) -> None:
        if not isinstance(store, OnlineStore):
            raise TypeError("expected a recipe with embed.mode = online")
        order = StreamOrder(store.layout, recipe.seed, recipe.training.batch_size)
        planned = needs(order, RowGroups(store.layout), range(*steps))
        self._visits = [visit for step in planned for visit in step.opened]
        self._tables = _encode(recipe, store.layout, [visit.group for visit in self._visits])
        self._num_ranks = num_ranks
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Any, int]] = {}  # number -> reference, ranks that will come
        self._encoded = 0

    def take(self, number: int) -> list[Any]:
        """A reference to an encoded row group; each rank takes each number once."""
        import ray

        with self._lock:
            while self._encoded <= number:
                self._held[self._encoded] = ray.put(next(self._tables)), self._num_ranks
                self._encoded += 1
            reference, ranks = self._held.pop(number)
            if ranks > 1:
                self._held[number] = reference, ranks - 1
            return [reference]

    def visits(self) -> list[Visit]:
        """All row groups that were and will be encoded, in this order."""
        return self._visits


def _encode(recipe: Recipe, layout: Layout, groups: list[int]) -> Iterator[pa.Table]:
    """Run the encoder actors over row groups, in order and only a little ahead."""
    import ray.data

    embed = recipe.embed
    source = ray.data.from_items(
        [{"group": group} for group in groups], override_num_blocks=len(groups)
    )
    context = quiet_context(source)
    context.target_max_block_size = None  # one block a row group, however large
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=_OBJECT_STORE_BYTES)
    actors = ray.data.ActorPoolStrategy(min_size=embed.encoders[0], max_size=embed.encoders[1])
    placed = recipe.model_copy(update={"encoder": recipe.encoder.absolute()})
    arguments = (placed, layout.inputs, ray.put(layout.shards))
    dataset = on_encoders(source, EncodeRowGroup, arguments, embed, actors)
    done = 0
    try:
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        for done, table in enumerate(batches, 1):  # noqa: B007
            yield table
    except ray.exceptions.RayError as error:
        where = f"at row group {groups[done]} of embed.prompts or one of the next"
        then = "The run goes on from its newest checkpoint"
        raise what_failed(error, embed, where, then) from error


class EncodeRowGroup:
    """The encoder actor: a row group's number in, its rows as a store holds them out."""

    def __init__(self, recipe: Recipe, inputs: StoreInputs, shards: Any) -> None:
        import ray

        self._encoder = load_encoder(recipe, inputs)
        self._batch_size = recipe.embed.batch_size
        self._dtype = inputs.dtype
        self._groups = [group for plan in ray.get(shards) for group in plan.prompts_by_group()]

    def __call__(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        """Encode one item, ``{"group": (1,)}``."""
        prompts = self._groups[int(batch["group"][0])]
        texts = [prompt.text for prompt in prompts]
        return encoded_table(prompts, self._encoder.encode(texts, self._batch_size), self._dtype)


class EncodedReader:
    """Reads what the encoding actor has encoded, in place of files.

    Args:
        encoder: handle of the encoding actor.
        steps: the ones that it was made for; the stream ends with the last.
    """

    def __init__(self, encoder: Any, steps: range) -> None:
        self._encoder = encoder
        self._steps = steps

    def read(self, plan: StreamPlan) -> Iterator[tuple[PlannedStep, pa.Table]]:
        """Each step with its rows, once their row groups are encoded.

        Raises:
            ValueError: the encoder can't take a prompt, or gave numbers that aren't finite.
        """
        groups = RowGroups(plan.store.layout)
        held = _HeldGroups(self._encoder, needs(plan.order, groups, self._steps))

        def rows(step: PlannedStep) -> tuple[PlannedStep, pa.Table]:
            table = take_rows(held.advance(), groups, step.rows)
            table = with_replaced(table, [None] * len(step.rows))
            return step, decoded(table, plan.store.layout.inputs)

        return ahead(rows, islice(plan.steps(), len(self._steps)))


class _HeldGroups:
    """One rank's row groups: taken from the encoding actor, kept while steps need them."""

    def __init__(self, encoder: Any, needed: Iterator[Needs]) -> None:
        self._encoder = encoder
        self._needs = needed
        self._taken = 0
        self._closed: tuple[Visit, ...] = ()
        self._open: dict[Visit, pa.RecordBatch] = {}

    def advance(self) -> dict[int, pa.RecordBatch]:
        """Go on to the next step: take what it opens, drop what is used up; all that are held."""
        import ray

        for visit in self._closed:
            del self._open[visit]
        step = next(self._needs)
        for visit in step.opened:
            try:
                table = ray.get(ray.get(self._encoder.take.remote(self._taken))[0])
            except ray.exceptions.RayError as error:
                raise remote_cause(error) from error
            self._open[visit] = table.combine_chunks().to_batches()[0]
            self._taken += 1
        self._closed = step.closed
        return {visit.group: rows for visit, rows in self._open.items()}


def start_encoder(recipe: Recipe, store: Any, start: int, num_ranks: int) -> Any:
    """Start the encoding actor for a run's steps from `start` on; it ends with this process.

    Args:
        store: the run's planned store, or Ray's reference to it.
    """
    import ray

    actor = ray.remote(RowGroupEncoder).options(
        num_cpus=0, max_concurrency=num_ranks + 1, scheduling_strategy="DEFAULT"
    )
    return actor.remote(recipe, store, (start, recipe.training.steps), num_ranks)
