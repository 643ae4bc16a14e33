"""What the sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from piflow import storage

_MOST = 2**31 - 1  # of a count: beyond it, tensors and schedulers overflow

_LARGEST = 1e12  # of a factor, a norm or a number of seconds

Positive = Annotated[int, Field(gt=0, le=_MOST)]
NonNegative = Annotated[int, Field(ge=0, le=_MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
PositiveFloat = Annotated[float, Field(gt=0, le=_LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_LARGEST)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]


def valid_uri(uri: str) -> str:
    """The URI itself.

    Raises:
        ValueError: as `storage.require_valid`.
    """
    storage.require_valid(uri)
    return uri


Uri = Annotated[str, AfterValidator(valid_uri)]
"""A place of files: well written, of a scheme that piflow knows, and without keys or passwords."""

Value = TypeVar("Value")
OPERATIONAL = "operational"
Operational = Annotated[Value, OPERATIONAL]
"""A key that says where, how fast or how long a run goes, and never what comes out of it: it is no
part of the run's identity, and may change from one start of a run to the next.
"""


class RecipeError(ValueError):
    """A recipe that can't be used; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    """Keys that belong together; unknown ones are refused.

    Values are what they are written as: true is no 1, "7" no number, and numbers are finite.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class Variant(Section):
    """One choice of several; `type` says which."""

    type: str
