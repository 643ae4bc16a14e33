"""A watcher on each machine of a cloud's spot market: tells Ray before the machine is taken away.

Ray moves work from a machine that is drained, and piflow's workers save and end when theirs is; but
nothing in Ray asks a cloud's metadata service whether it has given notice. This does, on the
service's link-local address alone, without redirects and proxies, and calls `ray drain-node`.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from piflow.storage.foreign import ForeignDataError, parse_object, shown

Cloud = Literal["aws", "gcp"]

ADDRESS = "169.254.169.254"
"""Of both clouds' metadata services; no other machine can have it."""

NOTICE_SECONDS: dict[Cloud, int] = {"aws": 120, "gcp": 30}
"""What the clouds promise between notice and end; Amazon's notice also tells the time."""

_POLL_SECONDS: dict[Cloud, float] = {"aws": 5.0, "gcp": 1.0}
_TIMEOUT_SECONDS = 2.0  # of one question
_TOKEN_SECONDS = 21600  # the longest that Amazon's service gives
_MOST_BYTES = 4096  # of an answer
_DRAIN_SECONDS = 20.0  # of one call of `ray drain-node`
_RAY = (sys.executable, "-m", "ray.scripts.scripts")  # whatever PATH says
_NODE_ID = re.compile(r"--node_id=([0-9a-f]{56})$")


class MetadataError(ConnectionError):
    """The metadata service doesn't answer, or as it never does; it is asked again."""


@dataclass(frozen=True)
class Notice:
    """That this machine will go.

    Attributes:
        what: for people.
        seconds: until it does; None: the cloud only thinks that it may.
    """

    what: str
    seconds: float | None


class Metadata:
    """A cloud's metadata service.

    Args:
        port: another than 80 is for tests.
    """

    def __init__(self, cloud: Cloud, host: str = ADDRESS, port: int = 80) -> None:
        self._cloud, self._host, self._port = cloud, host, port
        self._token: tuple[str, float] | None = None  # Amazon's, and when to get another

    def notice(self) -> Notice | None:
        """What the cloud has told of this machine's end; None: nothing.

        Raises:
            MetadataError: no answer, or none that can be understood.
        """
        return self._of_amazon() if self._cloud == "aws" else self._of_google()

    def _of_amazon(self) -> Notice | None:
        headers = {"X-aws-ec2-metadata-token": self._fresh_token()}
        action = self._get("/latest/meta-data/spot/instance-action", headers)
        if action is not None:
            told = _object(action)
            when = told.get("time")
            seconds = NOTICE_SECONDS["aws"] if when is None else _seconds_until(when)
            return Notice(f"EC2 will {shown(told.get('action'), 40)} this machine", seconds)
        if self._get("/latest/meta-data/events/recommendations/rebalance", headers) is not None:
            return Notice("EC2 recommends to leave this machine", None)
        return None

    def _of_google(self) -> Notice | None:
        path = "/computeMetadata/v1/instance/preempted"
        answer = self._get(path, {"Metadata-Flavor": "Google"}, {"Metadata-Flavor": "Google"})
        if answer is None or answer.strip() not in (b"TRUE", b"FALSE"):
            raise MetadataError(f"expected TRUE or FALSE, got {shown(answer)}")
        if answer.strip() == b"FALSE":
            return None
        return Notice("Compute Engine preempts this machine", NOTICE_SECONDS["gcp"])

    def _fresh_token(self) -> str:
        if self._token is None or time.monotonic() >= self._token[1]:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
            answer = self._ask("PUT", "/latest/api/token", headers)
            if answer is None or not re.fullmatch(rb"[\w+/=-]{1,500}", answer):
                raise MetadataError("no token came from EC2's metadata service")
            self._token = answer.decode(), time.monotonic() + _TOKEN_SECONDS / 2
        return self._token[0]

    def _get(
        self, path: str, headers: dict[str, str], expected: dict[str, str] | None = None
    ) -> bytes | None:
        return self._ask("GET", path, headers, expected or {})

    def _ask(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        expected: dict[str, str] | None = None,
    ) -> bytes | None:
        """An answer's body; None: there is nothing under this path (404).

        `http.client` follows no redirect and knows no proxy.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise MetadataError(f"{path}: {shown(error)}") from error
        finally:
            connection.close()
        if response.status == 404:
            return None
        if response.status == 401:
            self._token = None  # the next question gets another
        if response.status != 200:
            raise MetadataError(f"{path} answered {response.status}, expected 200 or 404")
        for name, value in (expected or {}).items():
            if response.headers.get(name) != value:
                raise MetadataError(f"{path} answered without {name}: {value}; not the cloud's")
        return body


def _object(content: bytes) -> dict[str, object]:
    try:
        return parse_object(content, where="EC2's spot/instance-action", max_bytes=_MOST_BYTES)
    except ForeignDataError as error:
        raise MetadataError(str(error)) from error


def _seconds_until(when: object) -> float:
    """Until a time as Amazon writes it, ``2026-11-29T18:40:00Z``."""
    try:
        moment = datetime.strptime(str(when), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return float(NOTICE_SECONDS["aws"])  # a notice is a notice, whatever its time
    left = moment.timestamp() - time.time()
    return min(max(left, 0.0), float(NOTICE_SECONDS["aws"]))  # clocks differ


def watch(
    cloud: Cloud,
    cluster: str,
    *,
    drain_on_rebalance: bool = False,
    metadata: Metadata | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Ask the metadata service until it gives notice, have Ray drain this machine, and return.

    Args:
        cluster: host:port of Ray's head, as this machine's Ray was started with.
        drain_on_rebalance: also when EC2 says that a machine is at elevated risk; else that is told
            once, and the notice of its end is waited for.
    """
    service, told = metadata or Metadata(cloud), ""
    for notice in _answers(service, _POLL_SECONDS[cloud], tell):
        if notice is None:
            continue
        if notice.what != told:
            told = notice.what
            tell(told)
        if notice.seconds is None and not drain_on_rebalance:
            continue
        seconds = NOTICE_SECONDS[cloud] if notice.seconds is None else notice.seconds
        if _drained(cluster, notice.what, time.monotonic() + seconds, tell):
            return


def _answers(
    service: Metadata, pause: float, tell: Callable[[str], None]
) -> Iterator[Notice | None]:
    """What the service says, again and again; a problem is told when it begins and when it ends."""
    problem = ""
    while True:
        try:
            notice = service.notice()
        except MetadataError as error:
            if str(error) != problem:
                problem = str(error)
                tell(f"the metadata service can't be asked: {problem}")
        else:
            if problem:
                problem = ""
                tell("the metadata service answers again")
            yield notice
        time.sleep(pause)


def _drained(cluster: str, what: str, end: float, tell: Callable[[str], None]) -> bool:
    """Drain every node of the cluster that runs on this machine; whether all were."""
    nodes = nodes_here(cluster)
    if not nodes:
        tell(f"no Ray node of {cluster} runs on this machine")
        return False
    done = True
    for node in nodes:
        left = max(1, math.floor(end - time.monotonic()))
        command = [*_RAY, "drain-node", "--address", cluster, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", what]
        command += ["--deadline-remaining-seconds", str(left)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_DRAIN_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            tell(f"`ray drain-node` failed: {shown(error)}")
            done = False
            continue
        if ended.returncode:
            tell(f"`ray drain-node` failed: {shown(ended.stderr.strip()[-500:], 500)}")
            done = False
        else:
            tell(f"Ray drains node {node[:12]}, which has {left} s")
    return done


def nodes_here(cluster: str, processes: Path = Path("/proc")) -> list[str]:
    """Ids of the cluster's nodes on this machine, by the command lines of Ray's processes."""
    found = []
    for file in processes.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = file.read_bytes().decode(errors="replace").split("\0")
            if f"--gcs-address={cluster}" not in words or not words[0].endswith("/raylet"):
                continue
            found += [match[1] for word in words if (match := _NODE_ID.match(word))]
    return sorted(found)
