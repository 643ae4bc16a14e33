"""Keys of `embed`: what parses can be laid out and given to Ray; what can't be is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from piflow.config import EmbedConfig
from piflow.data.layout import plan_store
from piflow.data.prompts import Prompt, choose_bucket

NUMBERS = st.integers(-2, 2**70)
FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-1, 9).map(float)
PAIRS = st.lists(NUMBERS, max_size=3)


def config(**keys: Any) -> EmbedConfig:
    return EmbedConfig(**{"prompts": "p.txt", "store": "s", "height": 8, "width": 8, **keys})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "height": NUMBERS,
            "width": NUMBERS,
            "buckets": st.lists(PAIRS, max_size=3),
            "seed": NUMBERS,
            "rows_per_shard": NUMBERS,
            "rows_per_group": NUMBERS,
            "batch_size": NUMBERS,
            "encoders": PAIRS,
            "gpus_per_encoder": FLOATS,
            "max_bad_pictures": FLOATS,
            "max_picture_pixels": NUMBERS,
            "max_prompts": NUMBERS,
        },
    )
)
@settings(max_examples=300, deadline=None)
def test_whatever_parses_can_be_laid_out_and_asked_of_ray(keys: dict[str, Any]) -> None:
    try:
        embed = config(**keys)
    except ValidationError:
        return
    prompts = []
    for text in "abc":
        sizes = embed.buckets or [[embed.height, embed.width]]
        prompts.append(Prompt(text, *choose_bucket(text, sizes, embed.seed)))
    buckets, shards = plan_store(prompts, embed.rows_per_shard, embed.rows_per_group)
    assert sum(bucket.rows for bucket in buckets) == 3
    assert sum(group.rows for shard in shards for group in shard.row_groups) == 3
    assert all(0 < side <= 65_536 for p in prompts for side in (p.height, p.width))
    least, most = embed.encoders
    assert 1 <= least <= most
    assert embed.gpus_per_encoder <= 1 or embed.gpus_per_encoder == int(embed.gpus_per_encoder)
    assert 0 <= embed.max_bad_pictures <= 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoders": [4, 1]}, r"at least 4 and at most 1 actors; write \[min, max\]"),
        ({"gpus_per_encoder": 1.5}, "neither a part of one GPU nor a whole number"),
        ({"gpus_per_encoder": float("inf")}, "gpus_per_encoder"),
        ({"height": 10**9}, "height"),
        ({"buckets": [[8, 10**9]]}, "buckets"),
        ({"max_bad_pictures": float("nan")}, "max_bad_pictures"),
        ({"max_picture_pixels": 2**40}, "max_picture_pixels"),
    ],
)
def test_what_no_run_can_do_is_refused_with_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**keys)
