"""Operations, bytes and live memory of computations whose costs are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from piflow.planning.counting import Operation, Watch, fused_attention


def operations(watch: Watch, phase: str = "rest") -> dict[Operation, int]:
    return dict(watch.counts.operations[phase])


def test_a_product_reads_and_writes_its_matrices() -> None:
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    with Watch() as watch:
        a @ b
    moved = 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert operations(watch) == {Operation("matmul", "float32", 2 * 3 * 5 * 7, moved): 1}


def test_views_cost_nothing_and_what_is_written_in_place_no_memory() -> None:
    x = torch.empty(4, 6, device="meta")
    with Watch() as watch:
        x.view(24).unflatten(0, (6, 4)).T.add_(1)
    assert operations(watch) == {Operation("other", "float32", 0, 4 * 24): 1}
    assert watch.live == 0


def test_memory_is_free_when_the_last_tensor_of_a_storage_is() -> None:
    x = torch.empty(10, device="meta")
    with Watch() as watch:
        with watch.phase("outer") as outer:
            first = x + 1
            part = first[:2]
            with watch.phase("inner") as inner:
                _ = first * 2 + first
            del first
            assert watch.live == 40 + 40  # the view keeps all of it, and the sum lives
            del part, _
    assert (inner.start, inner.peak, inner.end) == (40, 120, 80)
    assert (outer.peak, outer.end) == (120, 0)
    assert set(watch.counts.operations) == {"outer", "inner"}


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_scores(masked: bool) -> None:
    """Its products are counted, 4 N M d forward; without the replacement scores are kept."""
    heads, tokens, width = 2, 64, 8

    def attend(watch: Watch) -> int:
        q, k, v = (
            torch.empty(1, heads, tokens, width, device="meta", requires_grad=True)
            for _ in range(3)
        )
        mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device="meta") if masked else None
        with watch:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            kept = watch.live
            out.sum().backward()
        return kept

    fused, plain = Watch(), Watch()
    with fused_attention():
        kept = attend(fused)
    values = heads * tokens * width
    assert values * 4 <= kept <= values * 4 + heads * tokens * 4 + 1024
    counted = [o for o in operations(fused) if o.kind == "attention"]
    assert sorted(o.flops for o in counted)[0] == 4 * values * tokens
    assert sorted(o.flops for o in counted)[1] == 10 * values * tokens
    assert attend(plain) > heads * tokens * tokens * 4
    usual: Any = F.scaled_dot_product_attention
    assert usual.__module__ != "piflow.planning.counting", "it is put back"
