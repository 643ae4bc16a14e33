"""Time: raw time tau <-> noise level sigma, segments, and few-step schedules.

Source: arXiv 2510.14974, sections 3 and 4. Noise level 1 is pure noise, 0 is data. Substeps and
segments are uniform in tau; networks and policies see sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)
Rounding = Literal["nearest", "up"]
"""How a number of substeps becomes whole."""
_SLACK = 1e-3  # of a substep, that float32 times may be off: 64.00001 isn't rounded up to 65


@dataclass(frozen=True)
class FlowSchedule:
    """sigma = s tau / (1 + (s - 1) tau), with time shift s.

    Args:
        shift: s > 0; 1 is the identity, larger values spend more steps at high noise.

    Raises:
        ValueError: `shift` isn't a positive finite number.
    """

    shift: float = 3.2

    def __post_init__(self) -> None:
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise ValueError(
                f"FlowSchedule: expected a finite shift > 0, got {self.shift}; "
                "use 1.0 for an unshifted clock"
            )

    @classmethod
    def for_sequence_length(
        cls,
        length: int,
        base_length: int = 256,
        max_length: int = 4096,
        base_log_shift: float = 0.5,
        max_log_shift: float = 1.15,
    ) -> FlowSchedule:
        """The dynamic shift: log s is linear in the number of image tokens.

        Args:
            length: image tokens of one sample.
            base_length, max_length: the two lengths that anchor the line.
            base_log_shift, max_log_shift: log s at those lengths (FLUX.1's values by default).
        """
        slope = (max_log_shift - base_log_shift) / (max_length - base_length)
        return cls(math.exp(base_log_shift + slope * (length - base_length)))

    def sigma(self, tau: Time) -> Time:
        """Noise level at raw time `tau`, both in [0, 1], any shape."""
        return self.shift * tau / (1 + (self.shift - 1) * tau)

    def tau(self, sigma: Time) -> Time:
        """Raw time at noise level `sigma`, the inverse of `sigma(tau)`."""
        return sigma / (self.shift + (1 - self.shift) * sigma)


@dataclass(frozen=True)
class Segment:
    """One network evaluation's share of raw time, from `tau_src` down to `tau_dst`."""

    tau_src: float
    tau_dst: float

    @property
    def size(self) -> float:
        """tau_src - tau_dst."""
        return self.tau_src - self.tau_dst


def segments(nfe: int, final_step_size_scale: float = 1.0) -> list[Segment]:
    """Split tau in [0, 1] into `nfe` segments, first (tau_src = 1) to last (tau_dst = 0).

    All are h = 1 / (nfe - 1 + f) long, except the last, which is f h long.

    Args:
        nfe: number of network evaluations N, at least 1.
        final_step_size_scale: f in (0, 1].

    Raises:
        ValueError: `nfe` < 1 or f outside (0, 1].
    """
    if nfe < 1:
        raise ValueError(
            f"segments: expected nfe >= 1, got {nfe}; one segment needs one evaluation"
        )
    if not 0 < final_step_size_scale <= 1:
        raise ValueError(
            f"segments: expected final_step_size_scale in (0, 1], got {final_step_size_scale}; "
            "1 makes all segments equal"
        )
    total = nfe - 1 + final_step_size_scale
    starts = [(i - 1 + final_step_size_scale) / total for i in range(nfe, 0, -1)]
    return [Segment(src, dst) for src, dst in zip(starts, [*starts[1:], 0.0], strict=True)]


class FewStepNumbers(Protocol):
    """Anything that carries a few-step schedule's numbers, such as a recipe's objective."""

    @property
    def nfe(self) -> int: ...
    @property
    def final_step_size_scale(self) -> float: ...
    @property
    def shift(self) -> float: ...
    @property
    def total_substeps(self) -> int: ...
    @property
    def substep_rounding(self) -> Rounding: ...


@dataclass(frozen=True)
class FewStep:
    """A few-step student's schedule: what it is trained on and sampled with.

    Attributes:
        nfe: network evaluations N, one a segment.
        final_step_size_scale: f in (0, 1], length of the last segment relative to the others.
        shift: time shift s of the noise schedule.
        total_substeps: S, policy substeps over the whole of tau in [0, 1].
        substep_rounding: of an interval's share of them.

    Raises:
        ValueError: a number that `segments`, `FlowSchedule` or `num_substeps` refuses.
    """

    nfe: int
    final_step_size_scale: float
    shift: float
    total_substeps: int
    substep_rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        segments(self.nfe, self.final_step_size_scale)
        FlowSchedule(self.shift)
        _check_substeps(self.total_substeps, self.substep_rounding)

    @classmethod
    def of(cls, numbers: FewStepNumbers) -> FewStep:
        """The schedule that a recipe's objective, or whatever has the same fields, names."""
        return cls(
            numbers.nfe,
            numbers.final_step_size_scale,
            numbers.shift,
            numbers.total_substeps,
            numbers.substep_rounding,
        )

    @cached_property
    def schedule(self) -> FlowSchedule:
        """Raw time <-> noise level."""
        return FlowSchedule(self.shift)

    @cached_property
    def segments(self) -> list[Segment]:
        """One an evaluation, from noise to data."""
        return segments(self.nfe, self.final_step_size_scale)

    @property
    def segment_size(self) -> float:
        """h = 1 / (N - 1 + f), every segment's length in tau but the last one's; at most 1.

        A student of one evaluation has the last segment alone, and h = 1 / f would leave [0, 1].
        """
        return min(1 / (self.nfe - 1 + self.final_step_size_scale), 1.0)


def sample_segments(
    batch: int, schedule_segments: Sequence[Segment], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw tau ~ U(0, 1] a sample and return its segment, for data-dependent training.

    Args:
        batch: number of samples B.
        schedule_segments: what `segments` returned.
        generator: source of the random numbers; results are on its device.

    Returns:
        tau_src (B,) and segment size (B,), float32. A segment is drawn in proportion to its size.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    tau = 1 - torch.rand(batch, generator=generator, device=device)  # in (0, 1], as tau must be
    sources = torch.tensor([segment.tau_src for segment in schedule_segments], device=device)
    sizes = torch.tensor([segment.size for segment in schedule_segments], device=device)
    index = (tau[:, None] <= sources).sum(1) - 1
    return sources[index], sizes[index]


def num_substeps(size: Tensor, total_substeps: int, rounding: Rounding = "nearest") -> Tensor:
    """Euler substeps of an interval of raw time: max(1, size * total_substeps), whole, int64.

    Args:
        size: (B,) lengths in tau.
        total_substeps: substeps over the whole of tau in [0, 1], S.
        rounding: nearest (half to even), as the released students were trained with it; or up, as
            the newest published trainer does.

    Raises:
        ValueError: `total_substeps` < 1, or another rounding.
    """
    _check_substeps(total_substeps, rounding)
    count = size * total_substeps
    whole = count.round() if rounding == "nearest" else (count - _SLACK).ceil()
    return whole.clamp(min=1).to(torch.int64)


def _check_substeps(total_substeps: int, rounding: Rounding) -> None:
    if total_substeps < 1:
        raise ValueError(f"expected total_substeps >= 1, got {total_substeps}; the default is 128")
    if rounding not in get_args(Rounding):
        raise ValueError(
            f"expected substep_rounding {' or '.join(get_args(Rounding))}, got {rounding!r}"
        )
