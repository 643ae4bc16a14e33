"""Which row groups an online run encodes, and when; the encoding itself is an integration test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from piflow.config import RecipeError, load_recipe
from piflow.data.encode import encode_row_groups
from piflow.data.layout import plan_store
from piflow.data.online import Needs, Visit, needs
from piflow.data.order import RowGroups, StreamOrder
from piflow.data.prompts import Prompt
from piflow.data.reader import EmbeddingStore

MakeStore = Callable[..., EmbeddingStore]
ONE_SIZE = {(32, 32): 103}
THREE_SIZES = {(32, 32): 50, (64, 32): 33, (16, 16): 3}
EMOJI = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"


def _needs(store: EmbeddingStore, steps: range) -> list[Needs]:
    return list(needs(StreamOrder(store.layout, 5, 12), RowGroups(store.layout), steps))


def _visits(store: EmbeddingStore, step: int) -> set[Visit]:
    """What a step's rows are in, from its places in the bucket's sequence."""
    order = StreamOrder(store.layout, 5, 12)
    bucket, place = order.place(step)
    epochs = np.arange(place, place + 12) // store.manifest.buckets[bucket].rows
    groups = RowGroups(store.layout).of(order.step(step)[1])
    return {Visit(int(e), int(g)) for e, g in zip(epochs, groups, strict=True)}


@pytest.mark.parametrize("sizes", [ONE_SIZE, THREE_SIZES])
@pytest.mark.parametrize("start", [0, 5, 9, 17])
def test_a_row_group_is_there_from_the_first_step_that_needs_it_to_the_last(
    make_store: MakeStore, sizes: dict[tuple[int, int], int], start: int
) -> None:
    store = make_store(sizes)
    steps = range(start, 60)
    needed = {step: _visits(store, step) for step in steps}
    present: set[Visit] = set()
    opened: Counter[Visit] = Counter()
    for step, need in zip(steps, _needs(store, steps), strict=True):
        opened.update(need.opened)
        present |= set(need.opened)
        assert needed[step] <= present
        for visit in need.closed:
            assert not any(visit in needed[later] for later in range(step + 1, 60))
        present -= set(need.closed)
        closable = {v for v in present if v.epoch < 5}  # their epochs end before step 60
        assert all(any(v in needed[later] for later in range(step + 1, 60)) for v in closable) or (
            step >= 59
        )
    assert set(opened) == set().union(*needed.values()), "nothing else is encoded"
    assert set(opened.values()) == {1}, "each once an epoch"


def test_an_epoch_visits_every_row_group_once(make_store: MakeStore) -> None:
    store = make_store(ONE_SIZE)
    groups = sum(len(shard.row_groups) for shard in store.manifest.shards)
    opened = [visit for need in _needs(store, range(103)) for visit in need.opened]  # 12 epochs
    assert sorted(opened) == [Visit(e, g) for e in range(12) for g in range(groups)]


def test_calls_of_the_encoder_never_mix_row_groups() -> None:
    """So that a row group alone decides its content, whoever encodes it."""
    prompts = [Prompt(str(number) * (1 + number % 3), 8, 8) for number in range(11)]
    _, [plan] = plan_store(prompts, 100, 4)
    calls: list[list[str]] = []

    def encode(texts):  # type: ignore[no-untyped-def]
        calls.append(list(texts))
        yield [2, 0], ["c", "a"]
        yield list(range(len(texts)))[1::2], ["b"]

    found = [rows for rows, _ in encode_row_groups(plan, encode)]
    texts = [prompt.text for prompt in prompts]
    assert calls == [texts[0:4], texts[4:8], texts[8:11]]
    assert found == [[2, 0], [1, 3], [6, 4], [5, 7], [10, 8], [9]]


def test_replacing_damage_of_a_store_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match="damaged_rows = replace is about a store's files"):
        load_recipe(EMOJI, ["embed.mode=online", "training.damaged_rows=replace"])
    load_recipe(EMOJI, ["embed.mode=online"])
