"""MLflow, and what `piflow evaluate` measures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from piflow.config.section import Positive, Section

_TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server; default: SQLite in the run folder."""

    experiment: str = "piflow"
    """Created when missing."""

    model_name: str | None = None
    """Registered model; default: the recipe's name."""

    system_metrics: bool = False
    """With the training metrics also system/*: CPU, memory, disk, network and GPUs of rank 0's
    machine.
    """

    @field_validator("uri")
    @classmethod
    def _is_a_server_or_database(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        kind, separator, rest = uri.partition("://")
        if not separator or kind.partition("+")[0] not in _TRACKING_SCHEMES or not rest:
            raise ValueError(
                "expected http(s)://host:port, a database's URI (postgresql://...) or "
                "sqlite:///path"
            )
        if kind in ("http", "https") and "@" in rest.partition("/")[0]:
            raise ValueError(
                "it holds a password, which would end up in logs; expected http(s)://host:port, "
                "with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return uri


class EvaluationConfig(Section):
    """What `piflow evaluate` measures."""

    prompts: Positive = 64
    """How many prompts."""

    prompt_list: str | None = None
    """URI of a text file, taken evenly spaced; default: the smallest prompt ids."""

    seeds: Annotated[int, Field(ge=2)] = 4
    """Pictures a prompt; held out."""

    teacher_steps: Positive = 32
    """Euler steps of the reference."""

    batch_size: Positive = 64
    """Pictures drawn at once."""

    retrieval: bool = True
    """Retrieval@1; needs the emoji pictures."""
