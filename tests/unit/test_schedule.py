"""The clock: inverses, segment boundaries, sampling of segments."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piflow.schedule import FewStep, FlowSchedule, num_substeps, sample_segments, segments


@given(st.floats(0.1, 20), st.floats(0, 1))
def test_tau_inverts_sigma(shift: float, tau: float) -> None:
    schedule = FlowSchedule(shift)
    assert schedule.tau(schedule.sigma(tau)) == pytest.approx(tau, abs=1e-12)
    exact = torch.tensor([tau], dtype=torch.float64)
    torch.testing.assert_close(schedule.tau(schedule.sigma(exact)), exact, rtol=0, atol=1e-12)


def test_known_values() -> None:
    assert FlowSchedule(3.2).sigma(0.5) == pytest.approx(1.6 / 2.1)
    assert FlowSchedule(1.0).sigma(0.3) == pytest.approx(0.3)
    assert [FlowSchedule(3.2).sigma(end) for end in (0.0, 1.0)] == [0.0, 1.0]


def test_dynamic_shift_is_log_linear_in_length() -> None:
    assert FlowSchedule.for_sequence_length(256).shift == pytest.approx(math.exp(0.5))
    assert FlowSchedule.for_sequence_length(4096).shift == pytest.approx(math.exp(1.15))
    middle = FlowSchedule.for_sequence_length((256 + 4096) // 2).shift
    assert middle == pytest.approx(math.exp(0.825))


@pytest.mark.parametrize("nfe", range(1, 9))
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0])
def test_segment_boundaries(nfe: int, scale: float) -> None:
    parts = segments(nfe, scale)
    size = 1 / (nfe - 1 + scale)
    assert len(parts) == nfe
    assert parts[0].tau_src == pytest.approx(1.0) and parts[-1].tau_dst == 0.0
    for number, part in zip(range(nfe, 0, -1), parts, strict=True):
        assert part.tau_src == pytest.approx((number - 1 + scale) * size)
        assert part.size == pytest.approx(size if number > 1 else scale * size)
    assert all(a.tau_dst == b.tau_src for a, b in zip(parts[:-1], parts[1:], strict=True))
    assert sum(part.size for part in parts) == pytest.approx(1.0)


def test_published_segment_size() -> None:
    assert segments(4, 0.5)[0].size == pytest.approx(0.2857142857)


@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_a_few_step_schedule_is_its_numbers(nfe: int, scale: float) -> None:
    few_step = FewStep(nfe, scale, shift=2.0, total_substeps=16)
    assert few_step.segments == segments(nfe, scale) and few_step.schedule == FlowSchedule(2.0)
    assert few_step.segment_size == pytest.approx(few_step.segments[0].size)
    assert FewStep.of(few_step) == few_step and len({few_step, FewStep.of(few_step)}) == 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0.5, 3.2, 128), "nfe >= 1"),
        ((4, 0.0, 3.2, 128), "final_step_size_scale in"),
        ((4, 0.5, 0.0, 128), "shift > 0"),
        ((4, 0.5, 3.2, 0), "total_substeps >= 1"),
    ],
)
def test_a_few_step_schedule_refuses_bad_numbers(numbers: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewStep(*numbers)


def test_sampled_segments_are_drawn_by_size() -> None:
    parts = segments(4, 0.5)
    sources, sizes = sample_segments(20000, parts, torch.Generator().manual_seed(0))
    for part in parts:
        chosen = (sources - part.tau_src).abs() < 1e-6
        assert chosen.float().mean().item() == pytest.approx(part.size, abs=0.015)
        torch.testing.assert_close(sizes[chosen], torch.full_like(sizes[chosen], part.size))


def test_substeps_are_rounded_and_at_least_one() -> None:
    sizes = torch.tensor([0.0, 0.001, 1.4 / 128, 1.6 / 128, 0.2857142857, 1.0])
    assert num_substeps(sizes, 128).tolist() == [1, 1, 1, 2, 37, 128]


def test_substeps_rounded_up() -> None:
    """Whole numbers stay, though times in float32 are off by some 1e-7 each."""
    sizes = torch.tensor([0.0, 0.001, 1.1 / 128, 0.2857142857, 0.5, 1.0])
    assert num_substeps(sizes, 128, "up").tolist() == [1, 1, 2, 37, 64, 128]
    for nfe in range(1, 33):
        few_step = FewStep(nfe, 0.5, 3.2, 256, "up")
        starts = torch.tensor([part.tau_src for part in few_step.segments])
        ends = torch.tensor([part.tau_dst for part in few_step.segments])
        exact = [
            math.ceil(Fraction(2 if part.tau_dst else 1, 2 * nfe - 1) * 256)
            for part in few_step.segments
        ]
        assert num_substeps(starts - ends, 256, "up").tolist() == exact
    with pytest.raises(ValueError, match="substep_rounding nearest or up, got 'down'"):
        FewStep(4, 0.5, 3.2, 128, "down")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowSchedule(0.0), "shift > 0"),
        (lambda: FlowSchedule(math.nan), "shift > 0"),
        (lambda: segments(0), "nfe >= 1"),
        (lambda: segments(4, 0.0), r"in \(0, 1\]"),
        (lambda: segments(4, 1.5), r"in \(0, 1\]"),
        (lambda: num_substeps(torch.ones(1), 0), "total_substeps >= 1"),
    ],
)
def test_bad_input_says_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
