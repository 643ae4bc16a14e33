"""A cluster's job server (`ray job submit`) and what its dashboard knows of machines.

this process -- HTTP, token --> dashboard (head, port 8265) --> agent --> a job's driver (head)

Everything goes through Ray's own client, `JobSubmissionClient`, with a limit of time. Before it
sends the cluster's token it is made sure that Ray answers at the address. What comes back is
foreign: numbers are taken as numbers, texts are `shown` where they are printed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from piflow.runtime.alive import is_listening
from piflow.runtime.exits import ExitCode
from piflow.storage.answers import answered_within
from piflow.storage.foreign import ForeignDataError, parse_object, redacted, shown

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's name; seconds between SIGTERM and SIGKILL
_DEFAULT_GRACE = 3  # Ray's
_KNOCK_SECONDS = 5.0
_PROBE_SECONDS = 20.0  # for a whole answer to the first question
_REQUEST_SECONDS = (5.0, 60.0)  # to connect, to be sent the next byte
_ANSWER_SECONDS = 120.0  # to be answered wholly; uploads take as long as they take
_OUTAGE_SECONDS = 60.0  # for which a log is waited for
_POLL_SECONDS = 1.0
_MAX_PROBE_BYTES = 65536
_MIB, _GIB = 2**20, 2**30
_ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray's own client prefers it to the address that it is given
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_NO_ROOM = ("JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT")
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
_TOKEN_TOLD = (
    "set RAY_AUTH_MODE=token, and give the cluster's token in RAY_AUTH_TOKEN, in the file that "
    "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token (chmod 600)"
)


class NoRayError(ValueError):
    """Something else than Ray's dashboard, or a Ray of another version, answers at an address."""


class JobTakenError(ValueError):
    """A job of this id is there."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray counts it.

    Attributes:
        gpu_kind: as the driver names it; empty: not known.
        gpu_gib: memory of its smallest GPU; None: not known.
    """

    name: str
    cpus: float
    gpus: float = 0.0
    gpu_kind: str = ""
    gpu_gib: float | None = None
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Live machines, and whether an autoscaler may bring more."""

    nodes: tuple[Node, ...]
    may_grow: bool


@dataclass(frozen=True)
class Job:
    """A job that somebody submitted.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        metadata: what was submitted with it.
        grace: seconds between SIGTERM and SIGKILL when it is stopped.
        exit_code: of its command, where the job server knows it.
    """

    id: str
    status: str
    metadata: Mapping[str, str]
    entrypoint: str = ""
    grace: int = _DEFAULT_GRACE
    exit_code: int | None = None
    error_type: str | None = None
    message: str = ""
    started: float | None = None
    ended_at: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self.status in _ENDED

    @property
    def code(self) -> int:
        """The exit code of whoever waited for its end; that of its command, as shells count."""
        if self.status == "SUCCEEDED":
            return ExitCode.DONE
        if self.status == "STOPPED":
            return ExitCode.TERMINATED
        if self.exit_code:
            return self.exit_code if self.exit_code > 0 else 128 - self.exit_code
        return ExitCode.NO_ROOM if self.error_type in _NO_ROOM else ExitCode.TRY_AGAIN


class JobServer:
    """The job server of one cluster; made by `connect`.

    Args:
        address: of the dashboard, ``http(s)://host:port``.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        before = os.environ.get(_ADDRESS)
        os.environ[_ADDRESS] = address
        try:
            self._client = _Client(address)
        finally:
            if before is None:
                del os.environ[_ADDRESS]
            else:
                os.environ[_ADDRESS] = before

    def page(self, job_id: str) -> str:
        """The job's page in the dashboard."""
        return f"{self.address}/#/jobs/{job_id}"

    def cluster(self) -> Cluster:
        """Its live machines."""
        summary = self._data("/nodes?view=summary").get("summary")
        nodes, kinds = [], {}
        for entry in summary if isinstance(summary, list) else []:
            raylet = entry.get("raylet") if isinstance(entry, dict) else None
            if isinstance(raylet, dict) and raylet.get("state") == "ALIVE":
                nodes.append(_node(entry, raylet))
                kinds[str(raylet.get("nodeId"))] = raylet.get("nodeTypeName")
        status = self._data("/api/cluster_status").get("clusterStatus") or {}
        report = status.get("autoscalerReport") if isinstance(status, dict) else None
        mapping = report.get("nodeTypeMapping") if isinstance(report, dict) else None
        return Cluster(tuple(nodes), not _is_fixed(mapping, kinds))

    def jobs(self) -> list[Job]:
        """All jobs that were submitted to the cluster, oldest first."""
        found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0)

    def job(self, job_id: str) -> Job:
        """One of them.

        Raises:
            ValueError: there is none of this id.
        """
        return _job(self._client.get_job_info(job_id))

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        folder: str,
        *,
        grace: int,
        metadata: Mapping[str, str],
    ) -> None:
        """Start a job in a copy of `folder`, on the head.

        Raises:
            JobTakenError: there is a job of this id.
        """
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": {GRACE: str(grace)}},
                metadata=dict(metadata),
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise JobTakenError(f"job {job_id} is there already") from error
            raise

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to a job, and SIGKILL when its grace is over; returns at once."""
        self._client.stop_job(job_id)

    def log(self, job_id: str) -> str:
        """What a job has printed so far."""
        return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Write a job's log as it grows, until the job ends. A lost connection is made again.

        Raises:
            ConnectionError: the job server didn't answer for a minute.
        """
        written, answered = 0, time.monotonic()
        while True:
            try:
                written = asyncio.run(self._tail(job_id, written, write))
                job = self.job(job_id)
                answered = time.monotonic()
                if job.has_ended:
                    write(self.log(job_id)[written:])  # a job that had no time to be followed
                    return job
            except _Interrupted as interrupted:
                written = interrupted.written
                if time.monotonic() - answered > _OUTAGE_SECONDS:
                    raise ConnectionError(
                        f"the job server at {self.address} didn't answer for "
                        f"{_OUTAGE_SECONDS:.0f} s; job {job_id} may run on"
                    ) from interrupted
            except ConnectionError:
                if time.monotonic() - answered > _OUTAGE_SECONDS:
                    raise
            time.sleep(_POLL_SECONDS)

    async def _tail(self, job_id: str, skip: int, write: Callable[[str], None]) -> int:
        """Write what is new, `skip` characters are old; returns how many there are then."""
        import aiohttp

        seen = 0
        try:
            async with aclosing(self._client.tail_job_logs(job_id)) as lines:  # type: ignore[type-var]
                async for text in lines:
                    new = text[max(0, skip - seen) :]
                    seen += len(text)
                    if new:
                        write(new)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            raise _Interrupted(max(seen, skip)) from error
        return max(seen, skip)

    def _data(self, endpoint: str) -> dict[str, Any]:
        """What the dashboard answers."""
        content = self._client._do_request("GET", endpoint).content
        data = parse_object(content, where=f"{self.address}{endpoint}").get("data")
        return data if isinstance(data, dict) else {}


class _Interrupted(Exception):
    """A log's connection ended before the log."""

    def __init__(self, written: int) -> None:
        super().__init__("the connection was lost")
        self.written = written


class _Client(JobSubmissionClient):
    """Ray's, which waits for an answer without end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        ask = super()._do_request
        seconds = None if method == "PUT" else _ANSWER_SECONDS
        try:
            answer = answered_within(
                seconds,
                lambda: ask(method, endpoint, **{"timeout": _REQUEST_SECONDS, **options}),
                f"the job server at {self._address}",
            )
        except AuthenticationError as error:
            raise PermissionError(
                f"the cluster at {self._address} refuses the token; {_TOKEN_TOLD}"
            ) from error
        except requests.RequestException as error:
            raise ConnectionError(
                f"the job server at {self._address} doesn't answer {endpoint.partition('?')[0]}"
            ) from error
        return answer

    def _raise_error(self, r: requests.Response) -> None:
        """Ray's answers hold whole tracebacks; the last line says it."""
        lines = r.text.strip().splitlines() or [f"status {r.status_code}"]
        said = shown(lines[-1], 500)
        if r.status_code == 404:
            raise ValueError(f"{said}; `piflow jobs` lists those of {self._address}")
        raise RuntimeError(f"the job server at {self._address} refused: {said}")


def connect(address: str | None = None) -> JobServer:
    """The job server of the cluster whose dashboard is at an address.

    Args:
        address: ``http(s)://host:port``; default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if it is
            one, or port 8265 of this machine.

    Raises:
        ConnectionError: nobody answers there.
        NoRayError: it isn't Ray's dashboard, or its Ray has another version.
        PermissionError: it asks for a token, and there is none or a wrong one.
    """
    place = _dashboard_address(address)
    parts = urlsplit(place)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not is_listening(f"{parts.hostname}:{port}", _KNOCK_SECONDS):
        raise ConnectionError(
            f"nobody listens at {place}; expected the address of the cluster's dashboard (port "
            "8265 of the head unless chosen), or a tunnel to it: `kubectl port-forward service/"
            "NAME-head-svc 8265`, `ray dashboard cluster.yaml`"
        )
    _require_ray(place)
    server = JobServer(place)
    theirs = str(server._client._server_ray_version)
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise NoRayError(
            f"the cluster at {place} runs Ray {shown(theirs, 40)}, here is {ray.__version__}; "
            f"install the cluster's: pip install 'ray[default]=={shown(theirs, 40)}'"
        )
    return server


def _dashboard_address(address: str | None) -> str:
    """``http(s)://host:port``, wherever it is said.

    Raises:
        NoRayError: it is an address of another kind.
    """
    said = "--address"
    if address is None:
        for name in (_ADDRESS, "RAY_ADDRESS"):
            value = os.environ.get(name, "")
            if value.startswith(("http://", "https://")):
                address, said = value, name
                break
        else:
            return DEFAULT_ADDRESS
    whole = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(whole)
        port, host = parts.port, parts.hostname
    except ValueError:
        port, host = None, None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise NoRayError(
            f"{said} = {redacted(address)}; expected the address of the cluster's dashboard, "
            "http://host:8265"
        )
    default = {"http": 8265, "https": 443}[parts.scheme]
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}:{port or default}{parts.path.rstrip('/')}"


def _require_ray(place: str) -> None:
    """Make sure, without the token, that Ray's dashboard answers.

    Raises:
        NoRayError: something else does.
        PermissionError: it asks for a token, and this process has none.
    """
    status, answer = _asked(f"{place}/api/version")
    if status in (401, 403):
        status, answer = _asked(f"{place}/api/authentication_mode")
        if answer.get("authentication_mode") == "token":
            if not _has_token():
                raise PermissionError(f"the cluster at {place} asks for a token; {_TOKEN_TOLD}")
            return
    if not isinstance(answer.get("ray_version"), str):
        raise NoRayError(
            f"what answers at {place} isn't Ray's dashboard (status {status}); expected its "
            "address, port 8265 of the head unless chosen, not that of ray.init (6379), ray:// "
            "(10001) or another service"
        )


def _asked(url: str) -> tuple[int | str, dict[str, Any]]:
    """Status and JSON of an answer; an empty object if it is none."""
    try:
        status, content = answered_within(_PROBE_SECONDS, lambda: _answer(url), "the dashboard")
    except Exception as error:  # also urllib3's own, of a body that isn't what its head says
        return f"no HTTP: {type(error).__name__}", {}
    try:
        return status, parse_object(content, where=url)
    except ForeignDataError:
        return status, {}


def _answer(url: str) -> tuple[int, bytes]:
    with requests.get(url, timeout=_KNOCK_SECONDS, allow_redirects=False, stream=True) as answer:
        return answer.status_code, answer.raw.read(_MAX_PROBE_BYTES, decode_content=True)


def _has_token() -> bool:
    from ray._private.authentication.http_token_authentication import (
        get_auth_headers_if_auth_enabled,
    )

    return bool(get_auth_headers_if_auth_enabled({}))


def _is_fixed(mapping: Any, kinds: Mapping[str, Any]) -> bool:
    """Whether no autoscaler will bring machines.

    Without one, Ray's monitor calls every machine a kind of its own, ``node_<id>``. Where it says
    nothing (the second autoscaler doesn't, nor does one that has just started) more may come.
    """
    if not isinstance(mapping, dict) or any(kinds.values()):
        return False
    return all(kind == f"node_{node}" for node, kind in mapping.items())


def _node(entry: Mapping[str, Any], raylet: Mapping[str, Any]) -> Node:
    resources = raylet.get("resourcesTotal")
    resources = resources if isinstance(resources, dict) else {}
    gpus = entry.get("gpus")
    gpus = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    sizes = [_number(gpu.get("memoryTotal")) * _MIB / _GIB for gpu in gpus]
    return Node(
        name=shown(entry.get("hostname") or entry.get("ip") or "?", 100),
        cpus=_number(resources.get("CPU")),
        gpus=_number(resources.get("GPU")),
        gpu_kind=shown(gpus[0].get("name") or "", 60) if gpus else "",
        gpu_gib=min(sizes) if sizes and min(sizes) > 0 else None,
        memory_gib=_number(resources.get("memory")) / _GIB,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _job(details: Any) -> Job:
    variables = (details.runtime_env or {}).get("env_vars") or {}
    grace = str(variables.get(GRACE, _DEFAULT_GRACE))
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        metadata=details.metadata or {},
        entrypoint=details.entrypoint,
        grace=int(grace) if grace.isdecimal() else _DEFAULT_GRACE,
        exit_code=details.driver_exit_code,
        error_type=None if details.error_type is None else str(details.error_type).split(".")[-1],
        message=details.message or "",
        started=None if details.start_time is None else details.start_time / 1000,
        ended_at=details.end_time / 1000 if details.end_time else None,
    )


def by_name(jobs: Sequence[Job], name: str) -> Job:
    """The job of this id, or the newest of the run whose jobs' ids begin with it.

    Raises:
        ValueError: there is none, or several runs have such jobs.
    """
    for job in jobs:
        if job.id == name:
            return job
    found = [job for job in jobs if job.id.startswith(name)]
    runs = {job.id.rpartition("-")[0] for job in found}
    if len(runs) == 1:
        return found[-1]
    if not found:
        raise ValueError(f"there is no job {shown(name)}; `piflow jobs` lists them")
    raise ValueError(
        f"several runs' jobs begin with {shown(name)}: "
        + ", ".join(shown(run, 100) for run in sorted(runs)[:5])
    )
