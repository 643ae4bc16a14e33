"""Real MLflow servers (SQLite, artifacts on a real S3 server), one of which is killed and started.

The other has a path prefix and passwords, and clients write artifacts to S3 themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from piflow import storage
from piflow.commands.export import served_by_mlflow
from piflow.runs import mlflow
from piflow.runs.registry import register_adapter
from piflow.runs.tracking import MlflowTracker, finish, resume, start
from tests import one_run
from tests.servers import MlflowServer, S3Server, free_ports

pytestmark = pytest.mark.timeout(300)
RECIPE = {"name": "small", "training": {"steps": 100}}
PASSWORD = "only-for-tests-of-mlflow"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), s3=s3_server).running() as server:
        yield server


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server
) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("guarded")
    server = MlflowServer(
        folder, s3=s3_server, prefix="/team/mlflow", password=PASSWORD, proxied=False
    )
    with server.running():
        yield server


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{s3_server.address}")


@pytest.fixture
def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)


def _files(client: Any, run_id: str, folder: str) -> list[str]:
    return sorted(item.path for item in client.list_artifacts(run_id, folder))


def _end_thread(tracker: MlflowTracker) -> None:
    box = tracker._outbox
    with box._changed:
        box._closed = True
        box._changed.notify_all()
    box._thread.join(20)


def test_all_of_a_run_goes_through_the_server_to_s3(
    server: MlflowServer, s3_server: S3Server, client: Any, tmp_path: Path
) -> None:
    run_id = start(server.uri, "through-s3", "small", RECIPE, {"piflow.run_dir": "here"})
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.html").write_text("<p>é")
    tracker = MlflowTracker(server.uri, run_id, str(tmp_path))
    tracker.log_metrics({"loss": 0.5, "lr": 1e-4}, 1)
    tracker.log_image(Image.new("RGB", (8, 8), (0, 0, 255)), "samples", 1)
    tracker.log_artifact("evaluation/report.html")
    tracker.event("checkpoint", "step 1")
    assert tracker.close() is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights.safetensors").write_bytes(b"x" * 5_000_000)
    lineage = {"piflow.run_id": run_id}
    served = served_by_mlflow([], "what", 100)
    for _ in range(2):
        found = register_adapter(
            server.uri, run_id, adapter, "through-s3", lineage, "newest", served
        )
        assert found == "1"
    assert finish(server.uri, run_id, str(tmp_path)) is None

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 0.5, "lr": 1e-4}
    assert run.data.params["training.steps"] == "100"
    picture, small = _files(client, run_id, "images")
    assert small.endswith("+compressed.webp") or picture.endswith("+compressed.webp")
    report = client.download_artifacts(run_id, "evaluation/report.html")
    assert Path(report).read_text() == "<p>é"
    assert [path[-15:] for path in _files(client, run_id, "events")] == ["-checkpoint.txt"]
    model = client.get_model_version_by_alias("through-s3", "newest")
    assert model.tags == lineage and model.run_id == run_id
    logged = client.get_logged_model(model.source.removeprefix("models:/"))
    assert logged.name.startswith("adapter-") and logged.source_run_id == run_id
    bucket = storage.sibling(s3_server.uri, "mlflow")
    names = storage.list_files(bucket)
    stored = [name.partition(f"{run_id}/artifacts/")[2] for name in names]
    assert {"recipe.yaml", "evaluation/report.html"} <= set(stored)
    assert any(name.endswith("/weights.safetensors") for name in names)
    assert not (tmp_path / "tracking-buffer").exists()


@pytest.mark.usefixtures("signed_in")
def test_a_path_prefix_passwords_and_artifacts_that_go_to_s3_directly(
    guarded: MlflowServer, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow import artifacts as mlflow_artifacts

    run_id = one_run.main(guarded.uri, str(tmp_path / "run"), "guarded", "of-the-team")
    client = MlflowClient(tracking_uri=guarded.uri, registry_uri=guarded.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 1 / one_run.STEPS
    assert run.info.artifact_uri.startswith(f"{guarded.artifacts}/")
    bucket = storage.sibling(s3_server.uri, "mlflow-direct")
    stored = {name.partition(f"{run_id}/artifacts/")[2] for name in storage.list_files(bucket)}
    assert {"recipe.yaml", "evaluation/report.html"} <= stored
    version = client.get_model_version_by_alias("of-the-team", "newest")
    report = Path(client.download_artifacts(run_id, "evaluation/report.html"))
    assert report.read_text() == "<p>é guarded"
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    weights = mlflow_artifacts.download_artifacts(
        artifact_uri=f"{model.artifact_location}/artifacts/adapter/weights.safetensors"
    )
    assert Path(weights).read_bytes() == b"guarded" * 100_000

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with pytest.raises(
        ValueError, match=r"401.*Check tracking.uri, MLFLOW_TRACKING_USERNAME"
    ) as told:
        start(guarded.uri, "at once", "small", RECIPE, {})
    assert "another" not in str(told.value) and PASSWORD not in str(told.value)


def test_two_runs_that_write_at_once(server: MlflowServer, client: Any, tmp_path: Path) -> None:
    """Both make the experiment and the registered model, and neither gets in the other's way."""
    names = ["first", "second"]
    processes = [
        subprocess.Popen(
            [sys.executable, one_run.__file__, server.uri, str(tmp_path / name), name, "shared"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    ended = [process.communicate(timeout=280) for process in processes]
    for process, (_, told) in zip(processes, ended, strict=True):
        assert process.returncode == 0, told
    runs = [out.split()[-1] for out, _ in ended]
    expected = [(step, 1 / step) for step in range(1, one_run.STEPS + 1)]
    for name, run_id in zip(names, runs, strict=True):
        points = client.get_metric_history(run_id, "loss")
        assert sorted((point.step, point.value) for point in points) == expected
        report = Path(client.download_artifacts(run_id, "evaluation/report.html"))
        assert report.read_text() == f"<p>é {name}"
    assert len({client.get_run(run_id).info.experiment_id for run_id in runs}) == 1
    versions = client.search_model_versions("name = 'shared'")
    assert {int(item.version): item.run_id for item in versions}.keys() == {1, 2}
    assert {item.run_id for item in versions} == set(runs)


def test_a_server_that_is_killed_and_comes_back_lacks_nothing(
    server: MlflowServer, client: Any, tmp_path: Path
) -> None:
    """Nothing waits for it; every point arrives once, in order, with the time it was logged."""
    run_id = start(server.uri, "outage", "small", RECIPE, {})
    tracker = MlflowTracker(server.uri, run_id, str(tmp_path))
    logged: dict[int, float] = {}
    longest = 0.0

    def log(tracker: MlflowTracker, step: int) -> None:
        nonlocal longest
        began = time.perf_counter()
        logged[step] = time.time()
        tracker.log_metrics({"loss": float(step)}, step)
        if step % 20 == 0:
            tracker.log_image(Image.new("RGB", (8, 8)), "samples", step)
            tracker.event("checkpoint", f"step {step}")
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.02)

    for step in range(1, 41):
        log(tracker, step)
    server.kill()
    for step in range(41, 81):
        log(tracker, step)
    tracker.keep()  # as a checkpoint does
    assert list((tmp_path / "tracking-buffer").iterdir())
    for step in range(81, 121):
        log(tracker, step)
    _end_thread(tracker)  # as if its process had been killed: what wasn't kept comes again
    server.start()
    replayed = MlflowTracker(server.uri, run_id, str(tmp_path))
    for step in range(71, 121):
        if step > 80:  # the others were kept
            logged[step] = time.time()
        replayed.log_metrics({"loss": float(step)}, step)
        if step % 20 == 0:
            replayed.log_image(Image.new("RGB", (8, 8)), "samples", step)
    server.wait()
    assert replayed.close() is None
    assert longest < 1, "a step waited for the server"

    points = sorted(client.get_metric_history(run_id, "loss"), key=lambda point: point.step)
    assert [(point.step, point.value) for point in points] == [(s, float(s)) for s in logged]
    for point in points:
        assert abs(point.timestamp / 1000 - logged[point.step]) < 0.5, point
    pictures = [path for path in _files(client, run_id, "images") if path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == [20, 40, 60, 80, 100, 120]
    tags = client.get_run(run_id).data.tags
    assert tags["event.tracking-away"].startswith("nothing was delivered for ")
    assert not list((tmp_path / "tracking-buffer").iterdir())


def test_a_server_that_is_away_is_an_error_at_the_start_only(
    server: MlflowServer, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = start(server.uri, "away", "small", RECIPE, {})
    monkeypatch.setattr("piflow.runs.mlflow.START_SECONDS", 1.5)
    monkeypatch.setattr("piflow.runs.tracking.START_SECONDS", 1.5)
    monkeypatch.setattr("piflow.runs.tracking._CLOSE_SECONDS", 1.5)
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ConnectionError, match="didn't answer for 2 s: start it, or check"):
        start(nobody, "away", "small", RECIPE, {})
    with pytest.raises(ConnectionError, match="refused"):
        resume(nobody, run_id, str(tmp_path / "a"), RECIPE, {}, must_answer=True)
    with pytest.raises(ValueError, match=r"404.*Check tracking.uri"):
        start(f"{server.uri}/elsewhere", "away", "small", RECIPE, {})
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="no such host: check tracking.uri"):
        start("http://no-such-host.invalid:5000", "away", "small", RECIPE, {})
    assert time.monotonic() - began < 10

    resume(nobody, run_id, str(tmp_path / "b"), RECIPE, {"attempt": "2"}, must_answer=False)
    assert "refused" in str(finish(nobody, run_id, str(tmp_path / "b"), "FAILED"))
    assert mlflow.get_run(client, server.uri, run_id).info.status == "RUNNING"
    monkeypatch.undo()  # a server that is there gets its time, on a loaded machine too
    resume(server.uri, run_id, str(tmp_path / "b"), RECIPE, {"attempt": "3"}, must_answer=True)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and run.data.tags["attempt"] == "3"
    assert not list((tmp_path / "b" / "tracking-buffer").iterdir())
