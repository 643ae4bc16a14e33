"""The size at which a family's pipeline shows its model the picture that is to be edited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MULTIPLE = 32  # pixels, of sides that follow from an area


@dataclass(frozen=True)
class ConditionSizes:
    """How a condition picture is scaled: to one of a few sizes, or to an area in its own ratio.

    It is stretched to that size, not cropped, as the families' pipelines do.

    Attributes:
        sizes: (height, width) pairs in pixels; a picture gets the one whose ratio is nearest.
        area: pixels of both sides' product, where there are no `sizes`; sides are multiples of 32.

    Raises:
        ValueError: neither is given.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    area: int = 0

    def __post_init__(self) -> None:
        if not self.sizes and self.area <= 0:
            raise ValueError("expected sizes or an area for condition pictures, got neither")

    def of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels for a picture of this size."""
        ratio = width / height
        if self.sizes:
            nearest = min((abs(ratio - w / h), w, h) for h, w in self.sizes)
            return nearest[2], nearest[1]
        long = math.sqrt(self.area * ratio)
        sides = (long / ratio, long)
        fitted = [max(1, round(side / _MULTIPLE)) * _MULTIPLE for side in sides]
        return fitted[0], fitted[1]

    def largest(self) -> tuple[int, int]:
        """The size with the most pixels, to plan with: a square where an area decides."""
        if self.sizes:
            return max(self.sizes, key=lambda size: size[0] * size[1])
        return self.of(1, 1)

    def instead(self, sizes: Sequence[Sequence[int]]) -> ConditionSizes:
        """These sizes, if there are any, in place of its own."""
        pairs = tuple((height, width) for height, width in sizes)
        return ConditionSizes(pairs) if pairs else self

    def __str__(self) -> str:
        if self.sizes:
            return f"nearest ratio of {', '.join(f'{h}x{w}' for h, w in self.sizes)}"
        return f"own ratio, {self.area} pixels in multiples of {_MULTIPLE}"
