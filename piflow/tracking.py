"""Experiment tracking: a thin layer over MLflow.

    driver          start_or_resume(...) -> run_id     parameters, tags, resolved recipe
                    finish(...)                        how the run ended
    rank 0          MlflowTracker(uri, run_id)         metrics, pictures, events, files
    other ranks     NullTracker()                      the same calls, nothing happens
    export          register_adapter(...)              adapter folder -> registered model version

A run outlives processes: it is created once, and whoever comes later continues it by its id. After
a restart the steps since the last checkpoint are computed again; they are not logged again, because
a tracker asks the server once for the last step it holds of a metric or picture and skips up to it.

Without a server the store is a SQLite file in the run's folder, artifacts beside it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import unquote, urlparse

import yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL.Image import Image

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_SQLITE = "sqlite:///"
_PARAM_LENGTH = 6000  # MLflow's limits, in characters
_TAG_LENGTH = 8000
_BATCH = 100  # parameters a request; metrics may be 1,000


class Tracker(Protocol):
    """What a training or evaluation loop reports to."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point a metric; a metric's steps grow, a step it already has is skipped."""

    def log_summary(self, metrics: Mapping[str, float], step: int) -> None:
        """One point a metric, whatever is there: results that a later run of a tool replaces."""

    def log_image(self, image: Image, key: str, step: int) -> None:
        """One picture of the series ``key``; a step that the series already has is skipped."""

    def log_artifact(self, local_path: Path, folder: str | None = None) -> None:
        """A file, or a folder's contents, copied into the run's artifact folder ``folder``."""

    def event(self, name: str, text: str) -> None:
        """Something that happened once: a restart, a resize, a refused batch."""

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Ends the run; it can be resumed."""


class NullTracker:
    """Tracking is off, or this is not rank 0."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_summary(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_image(self, image: Image, key: str, step: int) -> None:
        pass

    def log_artifact(self, local_path: Path, folder: str | None = None) -> None:
        pass

    def event(self, name: str, text: str) -> None:
        pass

    def finish(self, status: RunStatus = "FINISHED") -> None:
        pass


class MlflowTracker:
    """Continues the MLflow run ``run_id`` at the tracking server ``uri``.

    Raises:
        ValueError: the server doesn't hold that run.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._client = _connect(uri)
        self._run_id = run_id
        _get_run(self._client, uri, run_id)
        self._last_steps: dict[str, int] = {}
        self._images = {item.path for item in self._client.list_artifacts(run_id, "images")}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        fresh = {key: value for key, value in metrics.items() if step > self._last_step(key)}
        self._log_points(fresh, step)

    def log_summary(self, metrics: Mapping[str, float], step: int) -> None:
        self._log_points(metrics, step)

    def log_image(self, image: Image, key: str, step: int) -> None:
        prefix = f"images/{key.replace('/', '~')}+step+{step}+"  # MLflow's own naming
        if any(path.startswith(prefix) for path in self._images):
            return
        self._client.log_image(self._run_id, image, key=key, step=step, synchronous=True)
        self._images.add(prefix)

    def log_artifact(self, local_path: Path, folder: str | None = None) -> None:
        if not local_path.exists():
            raise ValueError(f"nothing to log at {local_path}: no such file or folder")
        if local_path.is_dir():
            self._client.log_artifacts(self._run_id, str(local_path), folder)
        else:
            self._client.log_artifact(self._run_id, str(local_path), folder)

    def event(self, name: str, text: str) -> None:
        """All events are kept as text files ``events/<time>-<name>.txt``; a tag shows the last."""
        _log_event(self._client, self._run_id, name, text)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        self._client.set_terminated(self._run_id, status)

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            history = self._client.get_metric_history(self._run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        return self._last_steps[key]

    def _log_points(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        points = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        for start in range(0, len(points), _BATCH):
            self._client.log_batch(self._run_id, metrics=points[start : start + _BATCH])
        for key in metrics:
            self._last_steps[key] = max(step, self._last_step(key))


def default_tracking_uri(run_dir: str) -> str:
    """The SQLite store in a local run folder (a path or ``file://`` URI), which is created.

    Raises:
        ValueError: the run folder is not local.
    """
    parsed = urlparse(run_dir)
    if parsed.scheme not in ("", "file"):
        raise ValueError(
            f"the default tracking store is a SQLite file in the run's folder, which can't be on "
            f"{parsed.scheme}://; set tracking.uri to an MLflow server (http://...) or to "
            "sqlite:///<local path>"
        )
    folder = Path(unquote(parsed.path) if parsed.scheme else run_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return f"{_SQLITE}{folder / 'mlflow.db'}"


def start_or_resume(
    uri: str,
    experiment: str,
    run_name: str,
    run_id: str | None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """Create a run, or set an earlier one to running again; returns its id.

    Args:
        uri: MLflow tracking URI.
        experiment: created when missing; with SQLite its artifacts lie in ``mlartifacts`` beside
            the database.
        run_name: the name people see.
        run_id: the run to resume, or None for a new one.
        params: the resolved recipe; nested keys are joined by dots, and the whole is also logged as
            the artifact ``recipe.yaml``. MLflow's parameters can't change, so values that differ on
            resuming (say, the number of workers) become an event, and the recipe is kept beside the
            first one in ``resumed/``.
        tags: set anew each time.

    Raises:
        ValueError: the experiment was deleted, or the server doesn't hold ``run_id``.
    """
    client = _connect(uri)
    flat = flatten_params(params)
    if run_id is None:
        experiment_id = _experiment_id(client, uri, experiment)
        run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
        _log_params(client, run_id, flat)
        client.log_text(run_id, _to_yaml(params), "recipe.yaml")
    else:
        known = _get_run(client, uri, run_id).data.params
        client.update_run(run_id, status="RUNNING")
        _log_params(client, run_id, {key: flat[key] for key in flat.keys() - known.keys()})
        changed = sorted(key for key in known if known[key] != flat.get(key, "(absent)"))
        if changed:
            lines = [f"{key}: {known[key]} -> {flat.get(key, '(absent)')}" for key in changed]
            stamp = _log_event(client, run_id, "resumed-with-changes", "\n".join(lines))
            client.log_text(run_id, _to_yaml(params), f"resumed/{stamp}-recipe.yaml")
    for key, value in tags.items():
        client.set_tag(run_id, key, _cut(value, _TAG_LENGTH))
    return run_id


def finish(uri: str, run_id: str, status: RunStatus = "FINISHED") -> None:
    """Ends a run from the driver, which holds no tracker; the run can be resumed.

    Raises:
        ValueError: the server doesn't hold ``run_id``.
    """
    client = _connect(uri)
    _get_run(client, uri, run_id)
    client.set_terminated(run_id, status)


def register_adapter(
    uri: str, run_id: str, folder: Path, name: str, tags: Mapping[str, str], alias: str
) -> str:
    """Log an adapter folder to its run, register it as a model version and point ``alias`` at it.

    The artifact folder is named after the files' content, so that no version's files ever change;
    registering the same files of the same run again gives the version that is there.

    Args:
        folder: local folder of the exported adapter.
        name: registered model; created when missing.
        tags: of the version: its lineage.
        alias: such as "newest" (MLflow keeps "latest" for itself); moved from the version that had
            it.

    Returns:
        The version, a number as MLflow writes it ("1").

    Raises:
        ValueError: the folder is missing or empty, the server doesn't hold ``run_id``, or the alias
            is "latest".
    """
    if alias.lower() == "latest":
        raise ValueError('MLflow reserves the alias "latest"; use another, such as "newest"')
    client = _connect(uri)
    _get_run(client, uri, run_id)
    artifact_folder = f"adapters/{_content_hash(folder)}"
    client.log_artifacts(run_id, str(folder), artifact_folder)
    if not client.search_registered_models(f"name = '{_quotable(name)}'"):
        client.create_registered_model(name)
    source = f"runs:/{run_id}/{artifact_folder}"
    earlier = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    same = [item for item in earlier if item.source == source]
    model = same[0] if same else client.create_model_version(name, source=source, run_id=run_id)
    for key, value in tags.items():
        client.set_model_version_tag(name, model.version, key, _cut(value, _TAG_LENGTH))
    client.set_registered_model_alias(name, alias, model.version)
    return str(model.version)


def flatten_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Nested mappings to dotted keys and texts; values over MLflow's 6,000 characters are cut.

    Lists are one value, as YAML writes them in a line; None is "null". An empty mapping leaves
    nothing. Example: ``{"training": {"lr": 1e-4}}`` -> ``{"training.lr": "0.0001"}``.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": text for inner, text in flatten_params(value).items()})
        elif isinstance(value, str):
            flat[key] = _cut(value, _PARAM_LENGTH)
        else:
            line = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**9)
            flat[key] = _cut(line.removesuffix("...\n").strip(), _PARAM_LENGTH)
    return flat


def _connect(uri: str) -> MlflowClient:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
    from mlflow import MlflowClient

    # creating a SQLite store logs every schema migration
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _get_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"MLflow run {run_id} is not in {uri}; set tracking.uri to the server on which the "
            "run was started, or start in a new run_dir"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise ValueError(
            f"MLflow run {run_id} in {uri} was deleted; restore it (`mlflow runs restore "
            f"--run-id {run_id}`) or start in a new run_dir"
        )
    return run


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    existing = client.get_experiment_by_name(name)
    if existing is None:
        return client.create_experiment(name, artifact_location=_artifact_location(uri))
    if existing.lifecycle_stage == "deleted":
        raise ValueError(
            f"MLflow experiment {name!r} in {uri} was deleted; restore it (`mlflow experiments "
            f"restore --experiment-id {existing.experiment_id}`) or set tracking.experiment to "
            "another name"
        )
    return existing.experiment_id


def _artifact_location(uri: str) -> str | None:
    """Beside a SQLite file (MLflow's own choice would be the working directory); else the server's.

    None leaves the choice to the tracking server.
    """
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).absolute().parent / "mlartifacts").as_uri()


def _log_params(client: MlflowClient, run_id: str, flat: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in sorted(flat.items())]
    for start in range(0, len(params), _BATCH):
        client.log_batch(run_id, params=params[start : start + _BATCH])


def _log_event(client: MlflowClient, run_id: str, name: str, text: str) -> str:
    """Writes the event's file and tag; returns its time, to the microsecond (names the file)."""
    microseconds = time.time_ns() // 1000
    clock = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime(microseconds // 1_000_000))
    stamp = f"{clock}.{microseconds % 1_000_000:06d}Z"
    name = re.sub(r"[^\w.-]+", "-", name)
    client.log_text(run_id, text, f"events/{stamp}-{name}.txt")
    client.set_tag(run_id, f"event.{name}", _cut(text, _TAG_LENGTH))
    return stamp


def _content_hash(folder: Path) -> str:
    """16 hexadecimal digits of SHA-256 over the folder's files: names, sizes, contents."""
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    if not files:
        raise ValueError(f"no adapter at {folder}: the folder is missing or empty; export first")
    digest = hashlib.sha256()
    for item in files:
        digest.update(f"{item.relative_to(folder).as_posix()}\0{item.stat().st_size}\0".encode())
        with item.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _quotable(name: str) -> str:
    if "'" in name:
        raise ValueError(f"a registered model's name can't hold a quote, got {name!r}")
    return name


def _to_yaml(params: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_plain(params), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Mappings and tuples to what YAML writes without type tags."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
