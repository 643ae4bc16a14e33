"""What all sections of values have in common."""

from __future__ import annotations

from pydantic import ConfigDict

from piflow.config.section import NonNegative, Positive, PositiveFloat, Section

__all__ = ["NonNegative", "Positive", "PositiveFloat", "Strict"]


class Strict(Section):
    """Keys whose values are taken as they are: text isn't read as a number, nor 1 as true."""

    model_config = ConfigDict(strict=True)
