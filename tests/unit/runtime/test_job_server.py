"""Addresses of job servers: what isn't one is told at once, and gets no token."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from aiohttp import web

from piflow.commands.submit import follow_job
from piflow.runtime import job_server
from piflow.runtime.exits import ExitCode, exit_code
from piflow.runtime.job_server import Job, NoRayError, by_name, connect
from piflow.runtime.signals import StoppedError, ended_by_signals

TOKEN = "0123456789" * 4


class Answers(BaseHTTPRequestHandler):
    """Of a service: path -> (status, body)."""

    pages: dict[str, tuple[int, bytes]]
    heads: list[dict[str, str]]

    def do_GET(self) -> None:
        self.heads.append({key.lower(): value for key, value in self.headers.items()})
        status, body = self.pages.get(self.path, (404, b"nothing"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def service(pages: dict[str, tuple[int, bytes]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    heads: list[dict[str, str]] = []
    handler = type("Handler", (Answers,), {"pages": pages, "heads": heads})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heads
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def version(of_ray: str) -> bytes:
    return json.dumps({"version": "4", "ray_version": of_ray}).encode()


def test_nobody_at_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and doesn't listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"nobody listens at http://{address}") as caught:
            connect(address)
    assert exit_code(caught.value) == ExitCode.TRY_AGAIN


@pytest.mark.parametrize(
    "pages",
    [
        {},
        {"/api/version": (200, b"<html>a web page</html>")},
        {"/api/version": (200, b'{"version": "4"}')},
        {"/api/version": (200, b'{"ray_version": 3}')},
        {"/api/version": (200, b"[" * 100_000)},
        {"/api/version": (302, b"")},
        {"/api/version": (401, b"who are you?")},
        {"/api/version": (401, b""), "/api/authentication_mode": (200, b'"token"')},
        {"/api/version": (500, b"\xff\xfe")},
    ],
)
def test_another_service_is_told_and_gets_no_token(
    pages: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with service(pages) as (address, heads):
        with pytest.raises(NoRayError, match=f"what answers at {address} isn't Ray's dashboard"):
            connect(address)
        assert heads and not any(TOKEN in str(head) for head in heads)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\x00\x18\x04\x00"])
def test_a_service_without_http_is_told_in_seconds(
    greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no greeting at all it takes the connection and never says anything."""
    monkeypatch.setattr(job_server, "_KNOCK_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def greet() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                    held[-1].sendall(greeting)
                except OSError:
                    return

        threading.Thread(target=greet, daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(NoRayError, match="isn't Ray's dashboard"):
            connect(f"127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - begin < 60


def test_another_version_of_ray_is_told() -> None:
    with (
        service({"/api/version": (200, version("2.9.3"))}) as (address, _),
        pytest.raises(NoRayError, match=rf"runs Ray 2\.9\.3, here is {ray.__version__}") as caught,
    ):
        connect(address)
    assert "pip install 'ray[default]==2.9.3'" in str(caught.value)


def test_an_explicit_address_counts_more_than_rays_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with service({"/api/version": (200, version(ray.__version__))}) as (address, heads):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        assert connect(address).address == address and len(heads) > 1


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, "http://127.0.0.1:8265"),
        ("head", "http://head:8265"),
        ("head:80", "http://head:80"),
        ("https://head/ray/", "https://head:443/ray"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses_are_read_as_they_are_meant(address: str | None, expected: str) -> None:
    assert job_server._dashboard_address(address) == expected


def test_variables_that_name_a_dashboard_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert job_server._dashboard_address(None) == job_server.DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    assert job_server._dashboard_address(None) == "http://10.0.0.1:8265"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "head:port", "s3://bucket"])
def test_addresses_of_another_kind_are_refused(address: str) -> None:
    with pytest.raises(NoRayError, match="expected the address of the cluster's dashboard"):
        connect(address)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(NoRayError) as caught:
        connect("http://me:hunter2@head:8265")
    assert "hunter2" not in str(caught.value)


class Followed:
    """A job server whose log is cut off the first time; runs in a thread of its own."""

    def __init__(self, tails: list[tuple[list[str], bool]], status: list[str]) -> None:
        self.tails, self.status = tails, status
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self.ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self.ready.wait(10)

    def _run(self) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/j", self._job)
        app.router.add_get("/api/jobs/j/logs", self._log)
        app.router.add_get("/api/jobs/j/logs/tail", self._tail)
        asyncio.set_event_loop(self.loop)
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self.ready.set()
        self.loop.run_forever()

    async def _version(self, request: web.Request) -> web.Response:
        return web.Response(body=version(ray.__version__))

    async def _job(self, request: web.Request) -> web.Response:
        status = self.status.pop(0) if len(self.status) > 1 else self.status[0]
        job = {"type": "SUBMISSION", "submission_id": "j", "status": status, "entrypoint": "true"}
        return web.json_response(job)

    async def _log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": "one\ntwo\nthree\nlast\n"})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        socket_ = web.WebSocketResponse()
        await socket_.prepare(request)
        texts, is_whole = self.tails.pop(0)
        for text in texts:
            await socket_.send_str(text)
        if not self.tails:
            await asyncio.sleep(3600)
        if is_whole:
            await socket_.close()
        else:
            await asyncio.sleep(0.2)
            assert request.transport is not None
            request.transport.abort()
        return socket_


def test_a_followed_log_is_whole_and_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is cut, then ends while the job runs on, then misses the last line."""
    monkeypatch.setattr(job_server, "_POLL_SECONDS", 0.05)
    tails = [
        (["one\n", "tw"], False),
        (["one\ntwo\n"], True),
        (["one\n", "two\nthree\n"], True),
        ([], True),
    ]
    server = Followed(tails, ["RUNNING", "SUCCEEDED"])
    written: list[str] = []
    job = connect(f"127.0.0.1:{server.port}").follow("j", written.append)
    assert "".join(written) == "one\ntwo\nthree\nlast\n"
    assert job.code == 0 and len(server.tails) == 1
    server.loop.call_soon_threadsafe(server.loop.stop)


def test_ctrl_c_ends_the_following_and_not_the_job() -> None:
    server = Followed([(["one\n"], True)], ["RUNNING"])
    connected = connect(f"127.0.0.1:{server.port}")
    ctrl_c = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    with pytest.raises(StoppedError, match=r"stopped by SIGINT: job j runs on") as caught:
        with ended_by_signals():
            follow_job(connected, Job("j", "RUNNING", {}))
    assert exit_code(caught.value) == ExitCode.INTERRUPTED
    server.loop.call_soon_threadsafe(server.loop.stop)


def test_a_job_server_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(job_server, "_OUTAGE_SECONDS", 0.3)
    server = Followed([(["one\n"], False)] * 50, ["RUNNING"])
    written: list[str] = []
    with pytest.raises(ConnectionError, match="job j may run on"):
        connect(f"127.0.0.1:{server.port}").follow("j", written.append)
    assert written == ["one\n"]
    server.loop.call_soon_threadsafe(server.loop.stop)


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job("j", "SUCCEEDED", {}, exit_code=0), 0),
        (Job("j", "STOPPED", {}), 143),
        (Job("j", "FAILED", {}, exit_code=1), 1),
        (Job("j", "FAILED", {}, exit_code=69), 69),
        (Job("j", "FAILED", {}, exit_code=-9), 137),
        (Job("j", "FAILED", {}, error_type="JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"), 69),
        (Job("j", "FAILED", {}, error_type="JOB_SUPERVISOR_ACTOR_DIED"), 75),
    ],
)
def test_a_jobs_code_says_whether_a_retry_can_help(job: Job, code: int) -> None:
    assert job.code == code


def test_a_job_is_found_by_its_id_or_its_run() -> None:
    jobs = [Job(name, "RUNNING", {}) for name in ("a-1", "a-2", "b-1", "bb-1")]
    assert by_name(jobs, "a-1").id == "a-1"
    assert by_name(jobs, "a").id == "a-2"
    assert by_name(jobs, "bb").id == "bb-1"
    with pytest.raises(ValueError, match="several runs' jobs begin with b: b, bb"):
        by_name(jobs, "b")
    with pytest.raises(ValueError, match="there is no job c; `piflow jobs` lists them"):
        by_name(jobs, "c")


@pytest.mark.parametrize(
    ("mapping", "kinds", "fixed"),
    [
        ({"ab": "node_ab", "cd": "node_cd"}, {"ab": "", "cd": ""}, True),
        ({"ab": "ray.head.default"}, {"ab": ""}, False),
        ({"ab": "node_ab"}, {"ab": "headgroup"}, False),
        (None, {"ab": ""}, False),
    ],
)
def test_a_cluster_without_autoscaler_is_known(
    mapping: dict[str, str] | None, kinds: dict[str, str], fixed: bool
) -> None:
    assert job_server._is_fixed(mapping, kinds) is fixed
