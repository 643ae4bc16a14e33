"""Bringing a run's entries to an MLflow server, and what its client's errors mean.

An `Outbox` may show an entry more than once. Metrics are left out up to the last step that the
server holds, pictures by their series and step; the names of files come from the entry; and MLflow
takes a metric's point with the same time, step and value once.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import io
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import yaml

from piflow import storage
from piflow.runs import logged
from piflow.runs.outbox import Entry, EntryRefusedError, RunRefusedError, ServerAwayError
from piflow.storage.answers import answered_within
from piflow.storage.foreign import redacted, relative_name, shown
from piflow.storage.scratch import scratch

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PICTURES = uuid.UUID("6f1f7f43-54d2-4b43-9d28-7a0c9a4d7f10")  # of this project's picture names
_PARAM_LENGTH = 6000  # MLflow's limits, in characters
TAG_LENGTH = 8000
_BATCH = 100  # MLflow's limits of parameters and metrics a request
_METRIC_BATCH = 1000
_MOST_BYTES = 2**32  # of a file that is logged: it is held in memory
_REQUEST_SECONDS = 20  # until a request without an answer counts as failed; it is tried again here
START_SECONDS = 20.0  # a server must answer within this when a run starts
START_LIMIT = 60.0  # and must have taken all that a start tells it within this
_HTTP = ("http", "https", "mlflow-artifacts")  # schemes of artifacts that MLflow's server hands out
_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
)
_WRONG_NAMES = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)
_Answer = TypeVar("_Answer")

# MLflow reads it when it is imported. It is set here and not there: a process's environment must
# not change while threads of torch or Arrow read it in C, which ends in a segmentation fault.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


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
            flat[key] = cut(value, _PARAM_LENGTH)
        else:
            line = yaml.safe_dump(plain(value), default_flow_style=True, width=10**9)
            flat[key] = cut(line.removesuffix("...\n").strip(), _PARAM_LENGTH)
    return flat


class Delivery:
    """Brings entries to the server, each once, however often it is asked to."""

    def __init__(self, uri: str, run_id: str, run_dir: str) -> None:
        _import_mlflow()  # here, not in the writer thread, beside other imports
        self._uri = uri
        self._run_dir = run_dir
        self._run_id = run_id
        self._client: MlflowClient | None = None
        self._last_steps: dict[str, int] = {}
        self._images: set[str] | None = None
        self._models: dict[str, str] = {}  # name -> id

    def __call__(self, entries: Sequence[Entry]) -> int:
        """Deliver the first entry, and more metrics that follow it; returns how many.

        Raises:
            ServerAwayError: try again.
            RunRefusedError: the run is gone, or the server lets nobody in.
            EntryRefusedError: the first entry is wrong.
        """
        try:
            return self._deliver(entries)
        except Exception as error:  # whatever it is, it must not end the thread
            # the server may have got it nevertheless
            self._last_steps, self._images, self._models = {}, None, {}
            problem = _classified(error, self._uri)
            if not isinstance(problem, EntryRefusedError):
                raise problem from error
            self._require_run()
            if len(entries) > 1:  # one of them is wrong
                return self(entries[:1])
            raise problem from error

    def _deliver(self, entries: Sequence[Entry]) -> int:
        client, run_id = self._connected(), self._run_id
        entry = entries[0]
        data = entry.data
        if entry.kind == "metrics":
            return self._log_metrics(client, entries)
        if entry.kind == "picture":
            self._log_picture(client, entry)
        elif entry.kind == "file":
            *folder, name = relative_name(data["path"], where="an entry").split("/")
            _log_file(client, run_id, name, self._content(data), "/".join(folder))
        elif entry.kind == "event":
            name = f"{_clock(entry)}-{data['name']}.txt"
            _log_file(client, run_id, name, data["text"].encode(), "events")
            client.set_tag(run_id, f"event.{data['name']}", cut(data["text"], TAG_LENGTH))
        elif entry.kind == "resume":
            _resume(client, run_id, entry)
        elif entry.kind == "status":
            client.set_terminated(run_id, data["status"], end_time=entry.time_us // 1000)
        elif entry.kind in _OF_RUN:
            _OF_RUN[entry.kind](client, run_id, entry.step, data)
        else:
            raise EntryRefusedError(f"unknown kind {entry.kind!r}")
        return 1

    def _content(self, data: dict[str, Any]) -> bytes:
        """A file's bytes, which lie in the run's folder; a small text's in the entry."""
        if "content" in data:
            return _from_text(data["content"])
        name = relative_name(data["path"], where="an entry")
        try:
            content = storage.read_bytes(storage.join(self._run_dir, name), max_bytes=_MOST_BYTES)
        except FileNotFoundError as error:
            raise EntryRefusedError(f"{name} is no longer in {self._run_dir}") from error
        if hashlib.sha256(content).hexdigest() != data["sha256"]:
            raise EntryRefusedError(f"{name} was replaced since, and is logged by whoever did it")
        return content

    def _connected(self) -> MlflowClient:
        """A client, and the certainty that the run is there."""
        if self._client is None:
            client = connect(self._uri)
            get_run(client, self._uri, self._run_id)
            self._client = client
        return self._client

    def _require_run(self) -> None:
        """Raise RunRefusedError or ServerAwayError unless the run is there."""
        try:
            get_run(self._connected(), self._uri, self._run_id)
        except Exception as error:
            problem = _classified(error, self._uri)
            raise (
                RunRefusedError(str(problem)) if isinstance(problem, EntryRefusedError) else problem
            ) from error

    def _log_metrics(self, client: MlflowClient, entries: Sequence[Entry]) -> int:
        """As many entries as go into one request, at least one; points it has are left out."""
        from mlflow.entities import Metric

        points: list[Metric] = []
        last = dict(self._last_steps)
        count = 0
        for entry in entries:
            values = entry.data["values"] if entry.kind == "metrics" else {}
            if not values or (points and len(points) + len(values) > _METRIC_BATCH):
                break
            for key, value in values.items():
                if key not in last:
                    last[key] = _last_step(client, self._run_id, key)
                if entry.step > last[key] or entry.data["replace"]:
                    time_ms = entry.time_us // 1000
                    points.append(Metric(key, value, time_ms, entry.step, **self._about(entry)))
                    last[key] = max(last[key], entry.step)
            count += 1
        for start in range(0, len(points), _METRIC_BATCH):
            batch = points[start : start + _METRIC_BATCH]
            client.log_batch(self._run_id, metrics=batch, synchronous=True)
        self._last_steps = last
        return max(count, 1)  # one without values

    def _about(self, entry: Entry) -> dict[str, str]:
        """The model and the dataset that an entry's metrics are of, where it says so."""
        name, dataset = entry.data.get("model"), entry.data.get("dataset")
        about: dict[str, str] = {}
        if name is not None and name not in self._models:
            model = logged.find_model(self._connected(), self._run_id, name)
            if model is not None:
                self._models[name] = model.model_id
        if name in self._models:
            about |= {"model_id": self._models[name], "run_id": self._run_id}
        if dataset is not None:
            about |= {"dataset_name": dataset["name"], "dataset_digest": dataset["digest"]}
        return about

    def _log_picture(self, client: MlflowClient, entry: Entry) -> None:
        """As MLflow's own `log_image` does, under a name that doesn't change between tries."""
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

        from piflow.storage.picture import open_picture

        if self._images is None:
            found = client.list_artifacts(self._run_id, "images")
            self._images = {item.path.removeprefix("images/") for item in found}
        series = f"{entry.data['key'].replace('/', '~')}+step+{entry.step}+"
        done = {name for name in self._images if name.startswith(series)}
        if not any(name.endswith("+compressed.webp") for name in done):
            png = _from_text(entry.data["png"])
            stem = next((name.removesuffix(".png") for name in done), None) or (
                f"{series}timestamp+{entry.time_us // 1000}+{uuid.uuid5(_PICTURES, series)}"
            )
            small = io.BytesIO()
            compress_image_size(open_picture(png)).save(small, format="WEBP")
            _log_file(client, self._run_id, f"{stem}.png", png, "images")
            _log_file(client, self._run_id, f"{stem}+compressed.webp", small.getvalue(), "images")
            self._images |= {f"{stem}.png", f"{stem}+compressed.webp"}
        client.set_tag(self._run_id, MLFLOW_LOGGED_IMAGES, "True")


def _tag(client: MlflowClient, run_id: str, step: int, data: Mapping[str, Any]) -> None:
    set_tags(client, run_id, data["tags"])


_OF_RUN: dict[str, Callable[[MlflowClient, str, int, Mapping[str, Any]], None]] = {
    "tags": _tag,
    "dataset": logged.log_dataset,
    "checkpoint": logged.log_checkpoint,
    "kept": logged.forget_checkpoints,
}


def _last_step(client: MlflowClient, run_id: str, key: str) -> int:
    history = client.get_metric_history(run_id, key)
    return max((point.step for point in history), default=-1)


def _resume(client: MlflowClient, run_id: str, entry: Entry) -> None:
    """Running again; parameters that are new are added, those that changed are told."""
    params = entry.data["params"]
    flat = flatten_params(params)
    shown_keys = flatten_params(entry.data.get("readable", params)).keys()
    known = client.get_run(run_id).data.params
    client.update_run(run_id, status="RUNNING")
    log_params(client, run_id, {key: flat[key] for key in shown_keys - known.keys()})
    changed = sorted(key for key in known if known[key] != flat.get(key, "(absent)"))
    if changed:
        stamp = _clock(entry)
        text = "\n".join(f"{key}: {known[key]} -> {flat.get(key, '(absent)')}" for key in changed)
        name = f"{stamp}-resumed-with-changes.txt"
        _log_file(client, run_id, name, text.encode(), "events")
        client.set_tag(run_id, "event.resumed-with-changes", cut(text, TAG_LENGTH))
        client.log_text(run_id, to_yaml(params), f"resumed/{stamp}-recipe.yaml")
    set_tags(client, run_id, entry.data["tags"])


def _log_file(client: MlflowClient, run_id: str, name: str, content: bytes, folder: str) -> None:
    with scratch("artifact") as folder_here:
        path = folder_here / name
        path.write_bytes(content)
        client.log_artifact(run_id, str(path), folder or None)


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_tag(run_id, key, cut(value, TAG_LENGTH))


def _clock(entry: Entry) -> str:
    """Its time to the microsecond, as it stands in file names."""
    clock = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime(entry.time_us // 1_000_000))
    return f"{clock}.{entry.time_us % 1_000_000:06d}Z"


def _classified(
    error: Exception, uri: str
) -> ServerAwayError | RunRefusedError | EntryRefusedError:
    """What an error of MLflow's client means for what should happen next."""
    if isinstance(error, ServerAwayError | RunRefusedError | EntryRefusedError):
        return error
    status = _http_status(error)
    text = f"MLflow server {uri}: {_first_line(error)}"
    if isinstance(error, OSError) and error.errno in _WRONG_NAMES:
        return EntryRefusedError(text)
    if status in (401, 403, 404):
        return RunRefusedError(
            f"{text}. Check tracking.uri, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "(or MLFLOW_TRACKING_TOKEN)"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return EntryRefusedError(text)
    if status is not None or isinstance(error, OSError):
        return ServerAwayError(text)
    return EntryRefusedError(f"{text} ({type(error).__name__})")


def _http_status(error: Exception) -> int | None:
    """The status of a refusal; 503 without an answer; None: it isn't about a request."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    if isinstance(error, RequestException):
        return error.response.status_code if error.response is not None else 503
    if type(error).__module__.startswith(("boto3.", "botocore.")):  # artifacts on S3, from here
        return _s3_status(error)
    return None


def _s3_status(error: Exception) -> int:
    from botocore.exceptions import ClientError, NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return 400
    if not isinstance(error, ClientError):
        return 503
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 503))
    return 400 if status in (401, 403, 404) else status  # this file is refused, not the run


def _first_line(error: Exception) -> str:
    """What an error says, as it may stand in a terminal: servers put anything there."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], limit=500)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Errors of MLflow's client as ConnectionError or ValueError, with the server's address."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        problem = _classified(error, uri)
        if isinstance(problem, ServerAwayError):
            raise problem from error
        raise ValueError(str(problem)) from error


def answered(question: Callable[[], _Answer], uri: str) -> _Answer:
    """The first answer of a server that may be starting; asked again for 20 s.

    Raises:
        ServerAwayError: there was none.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return in_time(question, uri, max(1.0, deadline - time.monotonic()))
        except ServerAwayError as error:
            if _unknown_name(str(error)):
                raise ServerAwayError(
                    f"{error}. There is no such host: check tracking.uri"
                ) from error
            if time.monotonic() > deadline:
                raise ServerAwayError(
                    f"{error}. It didn't answer for {START_SECONDS:.0f} s: start it, or check "
                    "tracking.uri"
                ) from error
            time.sleep(1)


def in_time(question: Callable[[], _Answer], uri: str, seconds: float | None = None) -> _Answer:
    """A server's answer to one or more questions, if all of it is there after 20 s, or `seconds`.

    Raises:
        ServerAwayError: it isn't, or the server can't be reached.
        ValueError: the server refuses.
    """
    with explained(uri):
        return answered_within(seconds or START_SECONDS, question, "the server")


def _import_mlflow() -> None:
    """The first import, which is slow."""
    import mlflow  # noqa: F401

    # creating a SQLite store logs every schema migration
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(uri: str, request_seconds: int = _REQUEST_SECONDS) -> MlflowClient:
    """A client whose requests fail in time, unless the environment sets MLflow's own limits.

    MLflow's defaults, 120 s a request and 7 tries with growing waits, block for half an hour.
    """
    _import_mlflow()
    from mlflow import MlflowClient, environment_variables

    environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.default = request_seconds
    environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.default = 0
    with _alone(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process of a machine at a time opens a SQLite store: the first one makes its tables."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or not Path(path).parent.is_dir():
        yield
        return
    with Path(f"{path}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def require_own_server(uri: str, location: str | None) -> None:
    """Refuse artifacts that lie with another HTTP server than the one that is asked.

    MLflow's client sends this machine's user and password to whatever server an artifact's location
    names, and anyone who may register a model or make an experiment chooses that.

    Args:
        uri: of the tracking server.
        location: where a run's, an experiment's or a model's artifacts lie, as the server says.

    Raises:
        RunRefusedError: it is so, and there is something to send.
    """
    place = urlsplit(location or "")
    if place.scheme not in _HTTP or place.hostname in (None, urlsplit(uri).hostname):
        return
    file = Path("~/.mlflow/credentials").expanduser()
    if any(map(os.environ.get, _CREDENTIALS)) or file.exists():
        raise RunRefusedError(
            f"MLflow server {redacted(uri)} says that artifacts lie at {redacted(location)}, "
            "another server, which would get this machine's user and password of MLflow. If it is "
            "the same one under another name, give that name in tracking.uri"
        )


def get_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """The run, if it may be written.

    Raises:
        RunRefusedError: the server doesn't have it, or has deleted it; or `require_own_server`.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RunRefusedError(
            f"MLflow run {run_id} is not in {uri}; set tracking.uri to the server on which the "
            "run was started, or start in a new run_dir"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise RunRefusedError(
            f"MLflow run {run_id} in {uri} was deleted; restore it (`mlflow runs restore "
            f"--run-id {run_id}`) or start in a new run_dir"
        )
    require_own_server(uri, run.info.artifact_uri)
    return run


def log_params(client: MlflowClient, run_id: str, flat: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in sorted(flat.items())]
    for start in range(0, len(params), _BATCH):
        client.log_batch(run_id, params=params[start : start + _BATCH])


def to_yaml(params: Mapping[str, Any]) -> str:
    return yaml.safe_dump(plain(params), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Mappings and tuples to what YAML writes without type tags."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _from_text(text: str) -> bytes:
    return base64.b64decode(text)


def _unknown_name(message: str) -> bool:
    return "NameResolutionError" in message or "Name or service not known" in message


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
