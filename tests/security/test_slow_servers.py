"""Servers that send a byte now and then: each read is in time, and the answer never whole."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from piflow import storage
from piflow.runs import mlflow, registry, tracking
from piflow.runtime import job_server
from piflow.storage import hub, s3
from piflow.storage.answers import answered_within

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Padding: "


@contextmanager
def dripping() -> Iterator[str]:
    """``host:port`` of a server whose answers' heads have no end."""
    ended = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(2**16)
            try:
                connection.sendall(HEAD)
                while not ended.wait(0.05):
                    connection.sendall(b"x")
            except OSError:
                return

    def serve(listener: socket.socket) -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_a_run_does_not_start_at_a_server_that_never_finishes_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow, "START_SECONDS", 1.0)
    mlflow.connect("http://127.0.0.1:1")  # the first import takes seconds
    with dripping() as address, at_most(20), pytest.raises(ConnectionError) as caught:
        tracking.start(f"http://{address}", "experiment", "run", {}, {})
    message = str(caught.value)
    assert f"MLflow server http://{address}: the server listens, but gave no whole" in message
    assert "one that has begun goes on without" in message and "leave tracking.uri out" in message


def test_all_that_a_start_tells_has_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first question is answered; what follows isn't."""
    monkeypatch.setattr(tracking, "START_LIMIT", 1.0)
    monkeypatch.setattr(tracking, "_experiment_id", lambda *_: "1")
    mlflow.connect("http://127.0.0.1:1")
    with dripping() as address, at_most(20), pytest.raises(ConnectionError, match="within 1 s"):
        tracking.start(f"http://{address}", "experiment", "run", {}, {})


def test_a_run_that_has_begun_goes_on_and_keeps_what_it_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "START_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 1.0)
    with dripping() as address, at_most(30):
        uri, run_id = f"http://{address}", "0" * 32
        tracking.resume(uri, run_id, str(tmp_path), {}, {"attempt": "2"}, must_answer=False)
        tracker = tracking.MlflowTracker(uri, run_id, str(tmp_path))
        tracker.log_metrics({"loss": 1.0}, 1)
        assert tracker.close() == "not done within 1 s"
        assert tracking.finish(uri, run_id, str(tmp_path)) is not None
    kept = "".join(file.read_text() for file in (tmp_path / tracking.BUFFER).iterdir())
    assert '"attempt": "2"' in kept and '"loss": 1.0' in kept and "FINISHED" in kept


def test_questions_about_finished_runs_have_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "START_SECONDS", 1.0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/config.json").write_text("{}")
    with dripping() as address, at_most(30):
        assert not tracking.is_unfinished(f"http://{address}", "0" * 32)
        served = registry.Served(
            code=tmp_path, config={}, example="", params={}, description="", step=1
        )
        with pytest.raises(ConnectionError, match="didn't answer"):
            registry.register_adapter(
                f"http://{address}", "0" * 32, tmp_path / "adapter", "name", {}, "newest", served
            )


def test_a_dashboard_that_never_finishes_an_answer_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_server, "_PROBE_SECONDS", 1.0)
    with dripping() as address, at_most(20):
        with pytest.raises(job_server.NoRayError, match="isn't Ray's dashboard .*TimeoutError"):
            job_server.connect(address)


def test_a_job_server_that_falls_asleep_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(job_server, "_require_ray", lambda _: None)
    with dripping() as address, at_most(20), pytest.raises(OSError, match="no whole answer"):
        job_server.connect(address)


def test_an_object_store_that_never_finishes_an_answer_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 1.0)
    with dripping() as address, at_most(20):
        uri = f"s3://bucket/key?scheme=http&region=us-east-1&endpoint_override={address}"
        with pytest.raises(OSError, match=f"the object store http://{address} listens, but"):
            storage.exists(uri)


@pytest.mark.parametrize("use", [storage.exists, storage.local_folder])
def test_a_hub_that_never_finishes_an_answer_is_told(
    use: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.0)
    HfFileSystem.clear_instance_cache()
    with dripping() as address, at_most(20):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
        with pytest.raises(OSError, match=r"the hub listens, but gave no whole .+ \(within 1 s\)"):
            use("hf://lab/flux/transformer")  # type: ignore[operator]
    HfFileSystem.clear_instance_cache()


def test_an_answer_in_time_is_passed_on() -> None:
    assert answered_within(5, lambda: 7, "it") == 7
    assert answered_within(None, lambda: 8, "it") == 8
    with pytest.raises(KeyError, match="what"):
        answered_within(5, lambda: {}["what"], "it")
