"""The encoder actor of `piflow embed`, called by two threads as Ray calls it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
import torch

from piflow.backbones.text import EncodedPrompt
from piflow.config import parse_recipe
from piflow.data import embed
from piflow.data.embed import EncodeShard, encoder_idle_share
from piflow.data.layout import ShardPlan, empty_prompt_plan, negative_prompt_plan
from piflow.data.manifest import StoreError
from piflow.data.reader import EmbeddingStore
from piflow.data.shared_disk import require_same_store

PLANS = [empty_prompt_plan(), negative_prompt_plan("blurry")]


def test_a_shard_is_encoded_while_the_one_before_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Writing the first shard takes until the second one has been encoded."""
    encoded, written, at_once = Event(), [], Lock()

    def encode(texts: list[str]) -> Any:
        assert at_once.acquire(blocking=False), "two shards were encoded at a time"
        if texts == ["blurry"]:
            encoded.set()
        yield [0], [EncodedPrompt(torch.ones(1, 2), None, False)]
        at_once.release()

    class Json:
        def model_dump_json(self) -> str:
            return "{}"

        to_json = model_dump_json

    def write(store: str, plan: ShardPlan, *_: object) -> tuple[Json, Json]:
        assert encoded.wait(10), "the second shard waited for the first one's file"
        written.append(plan.prompts[0])
        return Json(), Json()

    monkeypatch.setattr(embed, "write_shard", write)
    monkeypatch.setattr(embed, "require_shared", lambda *_: None)
    actor = EncodeShard.__new__(EncodeShard)
    actor.__dict__.update(
        _plans=PLANS, _turn=Lock(), _name="actor", _busy=0.0, _pictures=[], _encode=encode,
        _store="", _writer="", _inputs=None,
    )  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda number: list(actor({"shard": [number]})), range(2)))
    assert sorted(prompt.text for prompt in written) == ["", "blurry"]
    assert [[row["prompts"] for row in shard] for shard in rows] == [[[0], [1], [0]]] * 2


def test_idle_share_counts_from_an_encoders_first_prompt_to_its_last() -> None:
    first = [embed._Work("a", 10.0, 14.0, 3.0), embed._Work("a", 15.0, 20.0, 5.0)]
    second = [embed._Work("b", 0.0, 10.0, 10.0)]
    assert encoder_idle_share(first) == pytest.approx(0.2)
    assert encoder_idle_share([*first, *second]) == pytest.approx(0.1)


def test_sizes_that_the_codec_refuses_are_refused_before_anything_is_embedded(
    tmp_path: Path,
) -> None:
    tree: dict[str, Any] = {
        "name": "x", "run_dir": "r", "encoder": {"path": str(tmp_path / "no encoder")},
        "model": {"path": str(tmp_path / "transformer")},
        "embed": {"prompts": str(tmp_path / "p.jsonl"), "store": str(tmp_path / "store"),
                  "height": 8, "width": 8, "height_column": "h", "width_column": "w"},
    }  # fmt: skip
    lines = ['{"prompt": "a", "h": 8, "w": 8}\n', '{"prompt": "b", "h": 8, "w": 30}\n']
    (tmp_path / "p.jsonl").write_text("".join(lines))
    expected = "prompt 'b': picture sizes must be positive multiples of 4 pixels, got 8×30"
    for mode in ("store", "online"):
        tree["embed"]["mode"] = mode
        with pytest.raises(ValueError, match=expected):
            embed.embed_prompts(parse_recipe(tree), session=fail, show_progress=False)
    tree["embed"] |= {"mode": "store", "width": 30, "height_column": None, "width_column": None}
    with pytest.raises(ValueError, match=r"embed.height and embed.width: .* got 8×30"):
        embed.embed_prompts(parse_recipe(tree), session=fail, show_progress=False)
    assert not (tmp_path / "store").exists()


def fail(*_: object) -> Any:
    raise AssertionError("Ray was started")


def test_a_worker_must_see_the_drivers_store(
    make_store: Callable[..., EmbeddingStore], tmp_path: Path
) -> None:
    store = make_store({(32, 32): 5})
    require_same_store(store)
    more = store.manifest.model_copy(update={"negative_prompts": (store.manifest.empty_prompt,)})
    require_same_store(EmbeddingStore(store.uri, more))  # whose negative prompts may come and go
    other = make_store({(32, 32): 6}, name="other")
    with pytest.raises(StoreError, match=f"store {store.uri} is .*it was replaced meanwhile"):
        require_same_store(EmbeddingStore(store.uri, other.manifest))
    absent = EmbeddingStore(str(tmp_path / "absent"), store.manifest)
    with pytest.raises(StoreError, match="doesn't see .*absent.*manifest.json is missing.* mount"):
        require_same_store(absent)
