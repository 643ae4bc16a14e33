"""What is different in a driver that Ray's job server started (`ray job submit`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

from piflow.config import Recipe

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's name of the variable
_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
_GRACE_SECONDS = 3.0  # Ray's default
_PACKAGES = "runtime_resources"  # a session's folder of unpacked working directories


class PathWontLastError(ValueError):
    """A path in a job's package folder, which is another one for every package."""


def in_ray_job() -> bool:
    """Whether Ray's job server started this process or one above it."""
    return _JOB in os.environ


def submission_id() -> str | None:
    """The id under which Ray's job server knows this process's job; None: this is no Ray job."""
    try:
        found = json.loads(os.environ.get(_JOB, "{}"))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def grace_seconds() -> float | None:
    """Seconds from `ray job stop` to SIGKILL; None: this is no Ray job."""
    if not in_ray_job():
        return None
    try:
        return float(os.environ.get(_GRACE, _GRACE_SECONDS))
    except ValueError:
        return _GRACE_SECONDS


def stopping_told(save_seconds: float | None) -> str:
    """The part of a sentence on how long a save takes, and whether a Ray job has that time."""
    told = "" if save_seconds is None else f", which takes about {save_seconds:.0f} s"
    grace = grace_seconds()
    if grace is not None and (save_seconds is None or save_seconds > grace):
        told += (
            f"; Ray's job server kills this process after {grace:.0f} s, and what isn't saved by "
            f"then is lost: {_remedy(save_seconds)}"
        )
    return told


def grace_told() -> str | None:
    """What to tell a job's operator at the start; None: somebody has set the grace."""
    grace = grace_seconds()
    if grace is None or grace > _GRACE_SECONDS:
        return None
    return (
        f"`ray job stop` kills this driver {grace:.0f} s after its SIGTERM, which is too short for "
        f"most saves: {_remedy(None)}"
    )


def _remedy(save_seconds: float | None) -> str:
    seconds = 600 if save_seconds is None else max(60, round(3 * save_seconds))
    variable = f'{{"env_vars": {{"{_GRACE}": "{seconds}"}}}}'
    return f"submit with --runtime-env-json '{variable}'"


def require_lasting_paths(recipe: Recipe) -> None:
    """In a Ray job, refuse to keep anything in its package folder.

    Raises:
        PathWontLastError: names the key and what to write instead.
    """
    embed = recipe.embed
    paths = {"run_dir": recipe.run_dir, "embed.store": embed.store}
    sqlite = (recipe.tracking.uri or "").partition("sqlite:///")[2]
    if sqlite:
        paths["tracking.uri"] = sqlite
    require_lasting(paths)


def require_lasting(paths: Mapping[str, str | Path]) -> None:
    """The same for places of any names; URIs of object stores last.

    Raises:
        PathWontLastError: names the first one and what to write instead.
    """
    if not in_ray_job():
        return
    for name, place in paths.items():
        parsed = urlparse(str(place))
        if parsed.scheme not in ("", "file"):
            continue
        path = Path(unquote(parsed.path) if parsed.scheme else str(place))
        absolute = Path(os.path.abspath(path))
        if not path.is_absolute() or _PACKAGES in absolute.parts:
            option = f"{name} " if name.startswith("--") else f"--set {name}="
            raise PathWontLastError(
                f"{name} = {str(place)!r} is a folder of this Ray job's package on one machine "
                f"({absolute}): the next submission would start in another one, and workers of "
                "other machines don't see it. Write an absolute path on a disk that all machines "
                f"share ({option}/shared/...), or s3://bucket/..."
            )
