"""Experiment tracking: a thin layer over MLflow.

    driver          start(...) -> run_id               parameters, tags, resolved recipe
                    resume(...), finish(...)           an earlier run goes on; how it ended
    rank 0          MlflowTracker(uri, run_id, dir)    metrics, pictures, events, files
    other ranks     NullTracker()                      the same calls, nothing happens

A run outlives processes: it is created once, and whoever comes later continues it by its id. After
a restart the steps since the last checkpoint are computed again; they are not logged again, because
the server is asked once for the last step it holds of a metric or picture, and all up to it is
skipped.

Training never waits for the server. What is logged goes through an `Outbox`, with the time when it
happened; while the server is away it is kept in memory and in `RUN_DIR/tracking-buffer`, and
whoever comes next to the run (`piflow distill`, `evaluate`, `export`) delivers what lies there. At
the start of a run the server must answer: a wrong address should not be found out hours later.

Without a server the store is a SQLite file in the run's folder, artifacts beside it.
"""

from __future__ import annotations

import base64
import errno
import io
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import unquote, urlparse

from piflow import storage
from piflow.runs.folder import RunRecord, checkpoint_name, checkpoint_uri
from piflow.runs.logged import Context, dataset_entry
from piflow.runs.mlflow import (
    START_LIMIT,
    START_SECONDS,
    Delivery,
    answered,
    connect,
    flatten_params,
    get_run,
    in_time,
    log_params,
    plain,
    require_own_server,
    set_tags,
    to_yaml,
)
from piflow.runs.outbox import Entry, Outbox, ServerAwayError
from piflow.runs.starts import note_start
from piflow.storage.foreign import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

    from piflow.config import Recipe

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

BUFFER = "tracking-buffer"  # in the run's folder
_SQLITE = "sqlite:///"
_KEEP_SECONDS = 10.0  # before a checkpoint counts
_CLOSE_SECONDS = 30.0  # for what is left when a process ends
_WITHOUT = (
    "Only a new run needs its server: one that has begun goes on without, and what it logs is kept "
    "in its folder. Without any server leave tracking.uri out: the run is tracked in its folder"
)
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # which pages MLflow shows for it
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a training or evaluation loop reports to."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point a metric; a metric's steps grow, a step it already has is skipped."""

    def log_summary(
        self, metrics: Mapping[str, float], step: int, dataset: Mapping[str, Any] | None = None
    ) -> None:
        """One point a metric, whatever is there: results that a later run of a tool replaces.

        They are of the checkpoint after `step` steps, where MLflow knows it, and of the dataset, an
        entry that `log_dataset` returned.
        """

    def log_dataset(
        self, name: str, uri: str, digest: str, context: Context, profile: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """A dataset that the run reads; `digest` is its content's hash, hexadecimal."""

    def log_checkpoint(self, step: int, tags: Mapping[str, str]) -> None:
        """The checkpoint after `step` steps, which lies in the run's folder, is a model."""

    def keep_checkpoints(self, step: int, kept: Sequence[int]) -> None:
        """Of the checkpoints up to `step`, those of the steps `kept` are there, no others."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Of the run; replaces those of the same names."""

    def log_image(self, image: Image, key: str, step: int) -> None:
        """One picture of the series ``key``; a step that the series already has is skipped."""

    def log_start(self, step: int, workers: int, reason: str) -> None:
        """Workers start after `step` steps: a point of the series `attempt` and `workers`.

        `reason` as of `piflow.runs.starts.note_start`.
        """

    def log_artifact(self, name: str) -> None:
        """A file of the run's folder, by its path in there, which is the artifact's path too."""

    def log_text(self, name: str, text: str) -> None:
        """A small text as an artifact of this path, which the next one of its name replaces."""

    def event(self, name: str, text: str) -> None:
        """Something that happened once: a restart, a resize, a refused batch."""

    def keep(self) -> None:
        """Waits (10 s at most) until all of this can't get lost; before a checkpoint counts.

        Raises:
            OSError: neither the server nor the run's folder takes it: the checkpoint can't count,
                since nobody would do its steps, and log them, again.
        """

    def close(self) -> str | None:
        """The process ends: delivers what is left, 30 s long. Returns why something was not."""


class NullTracker:
    """Tracking is off, or this is not rank 0."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_summary(
        self, metrics: Mapping[str, float], step: int, dataset: Mapping[str, Any] | None = None
    ) -> None:
        pass

    def log_dataset(
        self, name: str, uri: str, digest: str, context: Context, profile: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        return dataset_entry(name, uri, digest, context, profile)

    def log_checkpoint(self, step: int, tags: Mapping[str, str]) -> None:
        pass

    def keep_checkpoints(self, step: int, kept: Sequence[int]) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_image(self, image: Image, key: str, step: int) -> None:
        pass

    def log_start(self, step: int, workers: int, reason: str) -> None:
        pass

    def log_artifact(self, name: str) -> None:
        pass

    def log_text(self, name: str, text: str) -> None:
        pass

    def event(self, name: str, text: str) -> None:
        pass

    def keep(self) -> None:
        pass

    def close(self) -> str | None:
        return None


class MlflowTracker:
    """Continues the MLflow run `run_id` at the tracking server `uri`, in a thread.

    Nothing here waits for the server or fails by it, but `keep` and `close` within their limits;
    `keep` fails if the folder refuses as well.

    Args:
        run_dir: URI of the run's folder, for what can't be delivered.
    """

    def __init__(self, uri: str, run_id: str, run_dir: str) -> None:
        self._run_dir = run_dir
        self._outbox = _outbox(uri, run_id, run_dir)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        self._outbox.put(_entry("metrics", {"values": values, "replace": False}, step))

    def log_summary(
        self, metrics: Mapping[str, float], step: int, dataset: Mapping[str, Any] | None = None
    ) -> None:
        data: dict[str, Any] = {
            "values": {key: float(value) for key, value in metrics.items()},
            "replace": True,
            "model": checkpoint_name(step),
        }
        if dataset is not None:
            data["dataset"] = {key: dataset[key] for key in ("name", "digest")}
        self._outbox.put(_entry("metrics", data, step))

    def log_dataset(
        self, name: str, uri: str, digest: str, context: Context, profile: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        data = dataset_entry(name, uri, digest, context, profile)
        self._outbox.put(_entry("dataset", data))
        return data

    def log_checkpoint(self, step: int, tags: Mapping[str, str]) -> None:
        uri = storage.absolute(checkpoint_uri(self._run_dir, step))
        data = {"name": checkpoint_name(step), "uri": uri, "tags": dict(tags)}
        self._outbox.put(_entry("checkpoint", data, step))

    def keep_checkpoints(self, step: int, kept: Sequence[int]) -> None:
        names = [checkpoint_name(number) for number in kept]
        self._outbox.put(_entry("kept", {"kept": names}, step))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._outbox.put(_entry("tags", {"tags": dict(tags)}))

    def log_image(self, image: Image, key: str, step: int) -> None:
        png = io.BytesIO()
        image.save(png, format="PNG")
        self._outbox.put(_entry("picture", {"key": key, "png": _to_text(png.getvalue())}, step))

    def log_start(self, step: int, workers: int, reason: str) -> None:
        number, name = note_start(self._run_dir, step=step, workers=workers, reason=reason)
        values = {"attempt": float(number), "workers": float(workers)}
        self._outbox.put(_entry("metrics", {"values": values, "replace": True}, step))
        self.log_artifact(name)

    def log_artifact(self, name: str) -> None:
        """It is read again when it is delivered, so its size doesn't matter.

        Raises:
            ValueError: there is no such file.
        """
        place = storage.join(self._run_dir, name)
        if not storage.exists(place):
            raise ValueError(f"nothing to log at {place}: no such file")
        self._outbox.put(_entry("file", {"path": name, "sha256": storage.sha256(place)}))

    def log_text(self, name: str, text: str) -> None:
        content = _to_text(text.encode())
        self._outbox.put(_entry("file", {"path": name, "content": content}))

    def event(self, name: str, text: str) -> None:
        """All events are kept as text files ``events/<time>-<name>.txt``; a tag shows the last."""
        self._outbox.put(_event(name, text))

    def keep(self) -> None:
        if not self._outbox.keep(_KEEP_SECONDS):
            raise OSError(
                errno.EIO, "MLflow is away, and what it lacks can't be kept in the run's folder"
            )

    def close(self) -> str | None:
        return self._outbox.close(_CLOSE_SECONDS)


class SystemMetrics:
    """This machine's CPU, memory, disk, network and NVIDIA or AMD GPUs, in MLflow's own names.

    Args:
        machine: what tells it from the run's others; MLflow calls it a node's id.
    """

    def __init__(self, machine: str) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        self._prefix = f"system/{re.sub(r'[^A-Za-z0-9_.-]+', '-', machine)}"
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for gpus in (GPUMonitor, ROCMMonitor):
            try:
                self._monitors.append(gpus())
            except (ImportError, RuntimeError) as error:  # no such GPU, or not its Python package
                _log.info("no metrics of %s: %s", gpus.__name__, error)

    def read(self) -> dict[str, float]:
        """Since the last call; takes about a millisecond."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"{self._prefix}/{name}": float(value) for name, value in values.items()}


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


def place_of(recipe: Recipe, record: RunRecord | None) -> str:
    """Where a recipe's run is tracked: where the recipe says, else in the run's folder.

    A folder may be somebody else's. What it says of a server is compared with the recipe and never
    followed: requests to a server carry this machine's password or token.

    Raises:
        ValueError: the run's folder names another place than its own database, and the recipe none;
            or neither does, and the folder isn't local.
    """
    if recipe.tracking.uri is not None:
        return recipe.tracking.uri
    named = None if record is None else record.tracking_uri
    if named is None or storage.scheme(recipe.run_dir) == "file":
        own = default_tracking_uri(recipe.run_dir)
        # a folder that was moved names the database where it was
        moved = str(named).startswith(_SQLITE) and Path(own.removeprefix(_SQLITE)).exists()
        if named in (None, own) or moved:
            return own
    there = redacted(named)
    raise ValueError(
        f"the run in {recipe.run_dir} says that it is tracked in {there}, and the recipe doesn't. "
        "Databases are opened, and passwords sent to servers, where a recipe says so: if that is "
        f"the right place, add --set tracking.uri={there}"
    )


def start(
    uri: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    readable: Mapping[str, Any] | None = None,
) -> str:
    """Create a run; returns its id.

    Args:
        uri: MLflow tracking URI.
        experiment: created when missing; with SQLite its artifacts lie in ``mlartifacts`` beside
            the database.
        run_name: the name people see.
        params: the resolved recipe, which is logged as the artifact ``recipe.yaml``.
        tags: of the run.
        readable: the part of `params` that becomes the run's parameters, nested keys joined by
            dots; None: all of it.

    Raises:
        ConnectionError: the server didn't answer within 20 s, hadn't taken everything within 60 s
            more, or there is none of that name.
        ValueError: the server refuses, or the experiment was deleted.
    """
    client = connect(uri)

    def create(experiment_id: str) -> str:
        run_id = str(client.create_run(experiment_id, run_name=run_name).info.run_id)
        log_params(client, run_id, flatten_params(params if readable is None else readable))
        client.log_text(run_id, to_yaml(params), "recipe.yaml")
        set_tags(client, run_id, tags)
        return run_id

    try:
        experiment_id = answered(lambda: _experiment_id(client, uri, experiment), uri)
        return in_time(lambda: create(experiment_id), uri, START_LIMIT)
    except ServerAwayError as error:
        raise ServerAwayError(f"{error}. {_WITHOUT}") from error


def resume(
    uri: str,
    run_id: str,
    run_dir: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    must_answer: bool,
    readable: Mapping[str, Any] | None = None,
) -> None:
    """Deliver what earlier attempts left, then set the run to running again.

    MLflow's parameters can't change, so values that differ on resuming (say, the number of workers)
    become an event, and the recipe is kept beside the first one in ``resumed/``.

    Args:
        params, tags, readable: as for `start`; tags are set anew.
        must_answer: an error if the server is away; else this is delivered later, as all is.

    Raises:
        ConnectionError: it must answer and didn't within 20 s.
        ValueError: the server doesn't hold the run, or refuses.
    """
    outbox = _outbox(uri, run_id, run_dir)
    data = {"params": plain(params), "tags": dict(tags)}
    if readable is not None:
        data["readable"] = plain(readable)
    outbox.put(_entry("resume", data))
    problem = outbox.close(START_SECONDS)
    if problem is None:
        return
    if outbox.refused:
        raise ValueError(problem)
    if must_answer:
        raise ServerAwayError(problem)
    _log.warning("%s. The run goes on; what is logged is kept in %s until then", problem, run_dir)


def finish(uri: str, run_id: str, run_dir: str, status: RunStatus = "FINISHED") -> str | None:
    """Ends a run, which can be resumed; delivers what is left of it.

    Returns:
        Why something was not delivered: it is kept in the run's folder, with its time.
    """
    outbox = _outbox(uri, run_id, run_dir)
    outbox.put(_entry("status", {"status": status}))
    return outbox.close(_CLOSE_SECONDS)


def is_unfinished(uri: str, run_id: str) -> bool:
    """Whether the server says that the run is running or ended badly; no, if it doesn't say."""
    client = connect(uri)
    try:
        return in_time(lambda: str(get_run(client, uri, run_id).info.status) != "FINISHED", uri)
    except (OSError, ValueError):
        return False


def deliver_kept(uri: str, run_id: str, run_dir: str) -> str | None:
    """Deliver what earlier processes had to leave in the run's folder.

    Returns:
        Why something was not delivered.
    """
    if not storage.list_files(storage.join(run_dir, BUFFER)):
        return None
    return _outbox(uri, run_id, run_dir).close(_CLOSE_SECONDS)


def _outbox(uri: str, run_id: str, run_dir: str) -> Outbox:
    return Outbox(storage.join(run_dir, BUFFER), Delivery(uri, run_id, run_dir), _event)


def _entry(kind: str, data: dict[str, Any], step: int = 0) -> Entry:
    return Entry(kind, time.time_ns() // 1000, step, data)


def _event(name: str, text: str) -> Entry:
    return _entry("event", {"name": re.sub(r"[^\w.-]+", "-", name), "text": text})


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            location = _artifact_location(uri)
            return client.create_experiment(name, artifact_location=location, tags=_KIND)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return _experiment_id(client, uri, name)  # another run was started at the same time
    require_own_server(uri, existing.artifact_location)
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


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode()
