from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from piflow.backbones import Conditioning
from piflow.testing.conformance import samples


def make(batch: int, *, length: int = 3, pooled: bool = True) -> Conditioning:
    generator = torch.Generator().manual_seed(batch)
    return Conditioning(
        torch.randn(batch, length, 4, generator=generator),
        torch.full((batch,), length),
        torch.randn(batch, 2, generator=generator) if pooled else None,
    )


def test_cat_of_slices_is_the_whole() -> None:
    whole = make(5)
    joined = Conditioning.cat([samples(whole, 0, 2), samples(whole, 2, 5)])
    assert whole.pooled is not None and joined.pooled is not None
    assert torch.equal(joined.tokens, whole.tokens)
    assert torch.equal(joined.num_tokens, whole.num_tokens)
    assert torch.equal(joined.pooled, whole.pooled)


def test_a_shorter_part_is_padded() -> None:
    """Which makes room for a mask; parts that are full and of one length need none."""
    short, long = replace(make(1), full=True), replace(make(2, length=5), full=True)
    joined = Conditioning.cat([short, long])
    assert torch.equal(joined.tokens[:1, :3], short.tokens) and not joined.tokens[:1, 3:].any()
    assert torch.equal(joined.tokens[1:], long.tokens) and joined.num_tokens.tolist() == [3, 5, 5]
    assert not joined.full and Conditioning.cat([long, long]).full
    assert not Conditioning.cat([long, make(1, length=5)]).full
    mixed = long.where(torch.tensor([True, False]), short)
    assert torch.equal(mixed.tokens[1], joined.tokens[0]) and not mixed.full
    rows = torch.tensor([1])
    assert long.select(rows).full and short.expand(4).full and long.to("cpu").full


def test_to_converts_floats_only() -> None:
    converted = make(2).to("cpu", torch.float64)
    assert converted.tokens.dtype == torch.float64
    assert converted.pooled is not None and converted.pooled.dtype == torch.float64
    assert converted.num_tokens.dtype == torch.int64


def test_where_takes_each_sample_from_one_side() -> None:
    cond, empty = make(3), make(1)
    mixed = cond.where(torch.tensor([True, False, True]), empty)
    assert mixed.pooled is not None and empty.pooled is not None and cond.pooled is not None
    assert torch.equal(mixed.tokens[1], empty.tokens[0])
    assert torch.equal(mixed.pooled[1], empty.pooled[0])
    assert torch.equal(mixed.tokens[[0, 2]], cond.tokens[[0, 2]])


def test_expand() -> None:
    assert make(1).expand(3).batch_size == 3
    assert make(3).expand(3).batch_size == 3
    with pytest.raises(ValueError, match="can't expand a conditioning of 2 samples to 3"):
        make(2).expand(3)


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"share one width D of token states, got \[4, 5\]"):
        Conditioning.cat([make(1), Conditioning(torch.zeros(1, 3, 5), torch.ones(1))])
    with pytest.raises(ValueError, match="1 of 2 parts have a pooled vector"):
        Conditioning.cat([make(1), make(1, pooled=False)])
    with pytest.raises(ValueError, match="at least one part"):
        Conditioning.cat([])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"tokens must be \(B, L, D\)"):
        Conditioning(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"num_tokens must be \(2,\)"):
        Conditioning(torch.zeros(2, 3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"pooled must be \(2, P\)"):
        Conditioning(torch.zeros(2, 3, 4), torch.zeros(2), torch.zeros(1, 2))
