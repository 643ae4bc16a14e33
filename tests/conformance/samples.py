"""Some of a conditioning's samples."""

from __future__ import annotations

from piflow.backbones import Conditioning


def samples(cond: Conditioning, start: int, stop: int) -> Conditioning:
    """Samples `start` to `stop` (exclusive)."""
    return Conditioning(
        cond.tokens[start:stop],
        cond.num_tokens[start:stop],
        None if cond.pooled is None else cond.pooled[start:stop],
    )
