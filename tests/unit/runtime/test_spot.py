"""The watcher against stand-ins of both clouds' metadata services."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from piflow.runtime import spot
from piflow.runtime.spot import Cloud, Metadata, MetadataError, Notice, nodes_here, watch

ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
NODE = "ab" * 28


@dataclass
class Service:
    """Answers by path: a body, or a status; what isn't there is 404."""

    answers: dict[str, str | int] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=lambda: ["first=="])
    flavor: str = "Google"
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def metadata(self, cloud: Cloud) -> Metadata:
        return Metadata(cloud, "127.0.0.1", self.port)


@contextmanager
def serving(service: Service) -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            service.asked.append(f"PUT {self.path}")
            asks = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit()
            self._answer(service.tokens[0] if asks else 400)

        def do_GET(self) -> None:
            service.asked.append(f"GET {self.path}")
            if self.path.startswith("/latest/"):
                allowed = self.headers.get("X-aws-ec2-metadata-token") == service.tokens[0]
            else:
                allowed = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(service.answers.get(self.path, 404) if allowed else 401)

        def _answer(self, answer: str | int) -> None:
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Metadata-Flavor", service.flavor)
            self.send_header("Location", "/elsewhere")
            body = b"" if isinstance(answer, int) else answer.encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield service
        finally:
            server.shutdown()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    with serving(Service()) as running:
        yield running


def at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_no_notice_is_none(service: Service) -> None:
    service.answers[PREEMPTED] = "FALSE"
    assert service.metadata("aws").notice() is None
    assert service.metadata("gcp").notice() is None
    assert service.asked[:3] == ["PUT /latest/api/token", f"GET {ACTION}", f"GET {REBALANCE}"]


def test_amazons_notice_tells_the_time_that_is_left(service: Service) -> None:
    service.answers[ACTION] = f'{{"action": "terminate", "time": "{at(100)}"}}'
    notice = service.metadata("aws").notice()
    assert notice is not None and notice.what == "EC2 will terminate this machine"
    assert notice.seconds == pytest.approx(100, abs=3)


@pytest.mark.parametrize(
    ("when", "seconds"),
    [(at(-50), 0.0), (at(10_000), 120.0), ("soon", 120.0)],
    ids=["past", "far", "unreadable"],
)
def test_a_time_that_cant_be_is_within_what_amazon_promises(
    service: Service, when: str, seconds: float
) -> None:
    service.answers[ACTION] = f'{{"action": "stop", "time": "{when}"}}'
    notice = service.metadata("aws").notice()
    assert notice is not None and notice.seconds == seconds


def test_a_recommendation_has_no_time(service: Service) -> None:
    service.answers[REBALANCE] = '{"noticeTime": "2026-11-29T18:40:00Z"}'
    assert service.metadata("aws").notice() == Notice("EC2 recommends to leave this machine", None)


def test_googles_notice_is_thirty_seconds(service: Service) -> None:
    service.answers[PREEMPTED] = "TRUE"
    notice = service.metadata("gcp").notice()
    assert notice is not None and notice.seconds == 30


def test_a_token_that_is_refused_is_replaced(service: Service) -> None:
    metadata = service.metadata("aws")
    assert metadata.notice() is None
    service.tokens[0] = "second=="
    with pytest.raises(MetadataError, match="401"):
        metadata.notice()
    assert metadata.notice() is None
    assert service.asked.count("PUT /latest/api/token") == 2


@pytest.mark.parametrize(
    ("cloud", "answers", "told"),
    [
        ("aws", {ACTION: 302}, "answered 302"),  # not followed
        ("aws", {ACTION: 500}, "answered 500"),
        ("aws", {ACTION: "no JSON"}, "isn't JSON"),
        ("aws", {ACTION: "[1]"}, "expected an object"),
        ("gcp", {PREEMPTED: 302}, "answered 302"),
        ("gcp", {PREEMPTED: "perhaps\x1b[31m"}, r"TRUE or FALSE, got b'perhaps\\x1b"),
        ("gcp", {}, "expected TRUE or FALSE"),
    ],
)
def test_an_answer_that_the_cloud_never_gives_is_no_notice(
    service: Service, cloud: Cloud, answers: dict[str, str | int], told: str
) -> None:
    service.answers |= answers
    with pytest.raises(MetadataError, match=told):
        service.metadata(cloud).notice()
    assert "GET /elsewhere" not in service.asked


def test_another_server_than_googles_gives_no_notice(service: Service) -> None:
    service.answers[PREEMPTED], service.flavor = "TRUE", "Other"
    with pytest.raises(MetadataError, match="not the cloud's"):
        service.metadata("gcp").notice()


def test_a_service_that_is_silent_or_not_there_is_told_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    monkeypatch.setattr(spot, "_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(MetadataError, match="timed out"):
            Metadata("gcp", "127.0.0.1", silent.getsockname()[1]).notice()
        assert time.monotonic() - began < 5
        port = silent.getsockname()[1]
    with pytest.raises(MetadataError, match="refused"):
        Metadata("gcp", "127.0.0.1", port).notice()


# ------------------------------------------------------------------------------------- watching


def test_the_only_address_is_the_link_local_one() -> None:
    assert Metadata("aws")._host == "169.254.169.254" == spot.ADDRESS


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Calls of `ray drain-node`, a line each; the first fails. One node runs on this machine."""
    calls, ray = tmp_path / "calls", tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest $(wc -l < {calls}) -gt 1\n')
    ray.chmod(0o755)
    monkeypatch.setattr(spot, "_RAY", (str(ray),))
    monkeypatch.setattr(spot, "nodes_here", lambda cluster: [NODE])
    monkeypatch.setattr(spot, "_POLL_SECONDS", {"aws": 0.05, "gcp": 0.05})
    return calls


def test_a_notice_drains_the_machine_until_ray_has_understood(
    service: Service, drained: Path
) -> None:
    service.answers[ACTION] = f'{{"action": "terminate", "time": "{at(100)}"}}'
    told: list[str] = []
    watch("aws", "10.0.0.5:6379", metadata=service.metadata("aws"), tell=told.append)
    first, second = drained.read_text().splitlines()
    words = second.split()
    assert words[:5] == ["drain-node", "--address", "10.0.0.5:6379", "--node-id", NODE]
    assert "DRAIN_NODE_REASON_PREEMPTION" in words
    assert 90 < int(words[words.index("--deadline-remaining-seconds") + 1]) <= 100
    assert told[0] == "EC2 will terminate this machine" and "failed" in told[1]
    assert told[-1].startswith(f"Ray drains node {NODE[:12]}, which has")


def test_a_recommendation_drains_only_if_asked_to(service: Service, drained: Path) -> None:
    service.answers[REBALANCE] = "{}"
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        service.answers[ACTION] = '{"action": "terminate"}'

    watch("aws", "h:1", metadata=service.metadata("aws"), tell=tell)
    assert told[:2] == ["EC2 recommends to leave this machine", "EC2 will terminate this machine"]
    del service.answers[ACTION]
    told.clear()
    watch("aws", "h:1", metadata=service.metadata("aws"), drain_on_rebalance=True, tell=told.append)
    assert told[0].startswith("EC2 recommends") and told[-1].startswith("Ray drains")


def test_a_service_that_comes_back_is_told_once_each_way(service: Service, drained: Path) -> None:
    service.answers[PREEMPTED] = 503
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            threading.Timer(0.3, service.answers.update, [{PREEMPTED: "TRUE"}]).start()

    watch("gcp", "h:1", metadata=service.metadata("gcp"), tell=tell)
    assert "answered 503" in told[0] and told[1] == "the metadata service answers again"


def test_the_nodes_of_this_machine_are_those_of_the_cluster(tmp_path: Path) -> None:
    def process(number: str, *words: str) -> None:
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_bytes("\0".join(words).encode() + b"\0")

    mine, raylet = "--gcs-address=10.0.0.5:6379", "/venv/ray/core/src/ray/raylet/raylet"
    process("10", raylet, f"--node_id={NODE}", mine)
    process("11", raylet, f"--node_id={'cd' * 28}", "--gcs-address=10.0.0.6:6379")
    process("12", "python", f"--node_id={'ef' * 28}", mine)
    process("13")
    (tmp_path / "14").mkdir()
    assert nodes_here("10.0.0.5:6379", tmp_path) == [NODE]
