"""Tracking against real SQLite stores: what was logged is read back from them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from piflow import storage
from piflow.runs.mlflow import connect, flatten_params
from piflow.runs.tracking import (
    MlflowTracker,
    NullTracker,
    SystemMetrics,
    Tracker,
    default_tracking_uri,
    deliver_kept,
    finish,
    resume,
    start,
)

mlflow = pytest.importorskip("mlflow")

RECIPE: dict[str, Any] = {
    "name": "emoji",
    "seed": 0,
    "training": {"lr": 1e-4, "betas": (0.9, 0.95), "note": "é: yes"},
    "runtime": {"num_workers": 2},
    "lora": {"targets": None},
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests of this file (its schema takes seconds); each has its own run."""
    return default_tracking_uri(str(tmp_path_factory.mktemp("run")))


@pytest.fixture
def run_id(uri: str) -> str:
    return start(uri, "piflow", "emoji", RECIPE, {})


@pytest.fixture
def client(uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def run_dir(uri: str) -> str:
    return str(Path(uri.removeprefix("sqlite:///")).parent)


@contextmanager
def tracking(uri: str, run_id: str) -> Iterator[MlflowTracker]:
    """A tracker that has delivered all when the block ends."""
    tracker = MlflowTracker(uri, run_id, str(Path(uri.removeprefix("sqlite:///")).parent))
    yield tracker
    assert tracker.close() is None


def _points(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def _download(client: Any, run_id: str, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, path, str(folder))).read_text("utf-8")


def test_default_uri_is_in_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    expected = f"sqlite:///{folder}/mlflow.db"
    assert default_tracking_uri(str(folder)) == expected
    assert default_tracking_uri(folder.as_uri()) == expected
    assert folder.is_dir()


def test_default_uri_needs_a_local_run_folder() -> None:
    with pytest.raises(ValueError, match=r"can't be on s3://; set tracking.uri"):
        default_tracking_uri("s3://bucket/runs/one")


def test_a_new_run_holds_recipe_tags_and_name(uri: str, client: Any, tmp_path: Path) -> None:
    run_id = start(uri, "piflow", "my run", RECIPE, {"recipe_hash": "abc"})
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "my run"
    assert run.data.tags["recipe_hash"] == "abc"
    assert run.data.params == {
        "name": "emoji",
        "seed": "0",
        "training.lr": "0.0001",
        "training.betas": "[0.9, 0.95]",
        "training.note": "é: yes",
        "runtime.num_workers": "2",
        "lora.targets": "null",
    }
    logged = yaml.safe_load(_download(client, run_id, "recipe.yaml", tmp_path))
    assert logged == {**RECIPE, "training": {**RECIPE["training"], "betas": [0.9, 0.95]}}


def test_artifacts_lie_beside_the_database(
    uri: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with tracking(uri, run_id) as tracker:
        files = Path(tracker._run_dir) / "evaluation" / "files"
        files.mkdir(parents=True)
        (files.parent / "report.html").write_text("<p>")
        (files / "a.txt").write_text("a")
        tracker.log_artifact("evaluation/report.html")
        tracker.log_artifact("evaluation/files/a.txt")
        with pytest.raises(ValueError, match="nothing to log"):
            tracker.log_artifact("absent")
    stored = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / run_id / "artifacts"
    assert (stored / "evaluation" / "report.html").read_text() == "<p>"
    assert (stored / "evaluation" / "files" / "a.txt").read_text() == "a"
    assert set(tmp_path.iterdir()) == before  # no ./mlruns


def test_a_file_of_any_size_is_logged(uri: str, run_id: str, client: Any) -> None:
    """Two files that together are larger than the memory for what waits."""
    with tracking(uri, run_id) as tracker:
        folder = Path(tracker._run_dir) / "large"
        folder.mkdir()
        for name in ("report.html", "grid.jpg"):
            with (folder / name).open("wb") as stream:
                stream.truncate(80 * 2**20)
            tracker.log_artifact(f"large/{name}")
    found = client.list_artifacts(run_id, "large")
    assert {(item.path, item.file_size) for item in found} == {
        ("large/report.html", 80 * 2**20),
        ("large/grid.jpg", 80 * 2**20),
    }
    assert "event.tracking-lost" not in client.get_run(run_id).data.tags


def test_replayed_steps_are_logged_once(uri: str, run_id: str, client: Any) -> None:
    with tracking(uri, run_id) as first:
        for step in (10, 20, 30):
            first.log_metrics({"loss": float(step)}, step)
    with tracking(uri, run_id) as restarted:
        for step in (20, 30, 40):
            restarted.log_metrics({"loss": -float(step), "grad_norm": 1.0}, step)
    assert _points(client, run_id, "loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, -40.0)]
    # a metric has its own steps: one that is new, or is logged by another tool, is not held back
    assert _points(client, run_id, "grad_norm") == [(20, 1.0), (30, 1.0), (40, 1.0)]


def test_step_zero_is_logged(uri: str, run_id: str, client: Any) -> None:
    with tracking(uri, run_id) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
    with tracking(uri, run_id) as tracker:
        tracker.log_metrics({"loss": 2.0}, 0)
    assert _points(client, run_id, "loss") == [(0, 1.0)]


def test_a_summary_replaces_what_is_there(uri: str, run_id: str, client: Any) -> None:
    with tracking(uri, run_id) as tracker:
        tracker.log_summary({"eval/psnr_student": 20.0}, 100)
    with tracking(uri, run_id) as tracker:
        tracker.log_summary({"eval/psnr_student": 19.0}, 100)
    assert client.get_run(run_id).data.metrics["eval/psnr_student"] == 19.0


def test_many_and_non_finite_metrics(uri: str, run_id: str, client: Any) -> None:
    values = {f"m{index}": float(index) for index in range(250)}
    with tracking(uri, run_id) as tracker:
        tracker.log_metrics({**values, "bad": math.nan}, 1)
    logged = client.get_run(run_id).data.metrics
    assert math.isnan(logged.pop("bad"))
    assert logged == values


def test_images_are_logged_once_a_step(uri: str, run_id: str, client: Any, tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    with tracking(uri, run_id) as first:
        first.log_image(red, "samples/student", 5)
        first.log_image(red, "samples/student", 5)
    with tracking(uri, run_id) as restarted:
        restarted.log_image(red, "samples/student", 5)
        restarted.log_image(red, "samples/student", 50)
        restarted.log_image(red, "samples/teacher", 5)
    found = [item.path for item in client.list_artifacts(run_id, "images")]
    pngs = sorted(path for path in found if path.endswith(".png"))
    assert len(pngs) == 3 and len(found) == 6  # MLflow's interface shows a small copy of each
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    stored = Image.open(client.download_artifacts(run_id, pngs[0], str(tmp_path)))
    assert stored.size == (8, 8) and stored.getpixel((3, 3)) == (255, 0, 0)


def test_images_are_named_as_mlflow_names_its_own(uri: str, run_id: str, client: Any) -> None:
    """Its page of a run makes a series with a slider of files that are named so."""
    image = Image.new("RGB", (8, 8))
    with tracking(uri, run_id) as tracker:
        tracker.log_image(image, "samples/student", 5)
    client.log_image(run_id, image, key="samples/student", step=6)
    paths = [item.path for item in client.list_artifacts(run_id, "images")]
    kinds = {5: set(), 6: set()}
    for path in paths:
        found = re.fullmatch(
            r"(images/samples~student\+step\+)(\d)\+timestamp\+\d{13}\+[0-9a-f-]{36}(.*)", path
        )
        assert found is not None, path
        kinds[int(found[2])].add((found[1], found[3]))
    assert kinds[5] == kinds[6] and len(kinds[5]) == 2


def test_every_start_is_a_point_and_a_file(
    uri: str, run_id: str, client: Any, tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    starts = [(0, 2, "start"), (0, 2, "start"), (4, 2, "restart"), (4, 3, "resize")]
    for step, workers, reason in starts:
        tracker = MlflowTracker(uri, run_id, run_dir)
        tracker.log_start(step, workers, reason)
        assert tracker.close() is None
    assert _points(client, run_id, "attempt") == [(0, 1.0), (0, 2.0), (4, 3.0), (4, 4.0)]
    assert [value for _, value in _points(client, run_id, "workers")] == [2.0, 2.0, 2.0, 3.0]
    paths = sorted(item.path for item in client.list_artifacts(run_id, "starts"))
    lines = [json.loads(_download(client, run_id, path, tmp_path)) for path in paths]
    assert [line.pop("reason") for line in lines] == ["start", "resume", "restart", "resize"]
    assert lines.pop()["time"].endswith("Z")
    assert [(line["number"], line["step"], line["workers"]) for line in lines] == [
        (1, 0, 2),
        (2, 0, 2),
        (3, 4, 2),
    ]


def test_events_are_all_kept(uri: str, run_id: str, client: Any, tmp_path: Path) -> None:
    with tracking(uri, run_id) as tracker:
        tracker.event("worker lost", "first")
        tracker.event("worker lost", "second " + "x" * 9000)
    paths = sorted(item.path for item in client.list_artifacts(run_id, "events"))
    texts = [_download(client, run_id, path, tmp_path) for path in paths]
    assert texts == ["first", "second " + "x" * 9000]
    assert client.get_run(run_id).data.tags["event.worker-lost"].startswith("second x")


def test_resume_continues_the_same_run(uri: str, run_id: str, run_dir: str, client: Any) -> None:
    assert finish(uri, run_id, run_dir, "FAILED") is None
    failed = client.get_run(run_id)
    assert failed.info.status == "FAILED" and failed.info.end_time is not None
    resume(uri, run_id, run_dir, RECIPE, {"attempt": "2"}, must_answer=True)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["attempt"] == "2"
    assert not client.list_artifacts(run_id, "resumed")  # nothing changed
    assert finish(uri, run_id, run_dir) is None
    assert client.get_run(run_id).info.status == "FINISHED"


def test_resume_with_other_parameters_says_so(
    uri: str, run_id: str, run_dir: str, client: Any, tmp_path: Path
) -> None:
    changed = {**RECIPE, "runtime": {"num_workers": 1}, "added": "x" * 7000}
    resume(uri, run_id, run_dir, changed, {}, must_answer=True)
    run = client.get_run(run_id)
    assert run.data.params["runtime.num_workers"] == "2"
    assert len(run.data.params["added"]) == 6000
    assert run.data.tags["event.resumed-with-changes"] == "runtime.num_workers: 2 -> 1"
    (recipe,) = client.list_artifacts(run_id, "resumed")
    assert yaml.safe_load(_download(client, run_id, recipe.path, tmp_path))["runtime"] == {
        "num_workers": 1
    }
    kept = yaml.safe_load(_download(client, run_id, "recipe.yaml", tmp_path))
    assert kept["runtime"] == {"num_workers": 2}


def test_unknown_and_deleted_runs_are_named(
    uri: str, run_id: str, client: Any, tmp_path: Path
) -> None:
    """At once, also where an outage would be sat out; what was to be logged is kept."""
    with pytest.raises(ValueError, match=r"MLflow run 0123 is not in sqlite.*tracking.uri"):
        resume(uri, "0123", str(tmp_path / "a"), RECIPE, {}, must_answer=False)
    client.delete_run(run_id)
    with pytest.raises(ValueError, match=f"{run_id} in .* was deleted; restore it"):
        resume(uri, run_id, str(tmp_path / "b"), RECIPE, {}, must_answer=False)
    problem = finish(uri, run_id, str(tmp_path / "c"))
    assert problem is not None and "was deleted; restore it" in problem
    client.restore_run(run_id)
    assert deliver_kept(uri, run_id, str(tmp_path / "c")) is None
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_that_is_deleted_under_way_is_told_once(
    uri: str, run_id: str, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker(uri, run_id, str(tmp_path))
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.keep()
    client.delete_run(run_id)
    for step in range(2, 50):
        tracker.log_metrics({"loss": 1.0}, step)
        tracker.keep()
    problem = tracker.close()
    assert problem is not None and "was deleted; restore it" in problem
    assert len([record for record in caplog.records if "not delivered" in record.message]) == 1
    client.restore_run(run_id)
    assert deliver_kept(uri, run_id, str(tmp_path)) is None
    assert [step for step, _ in _points(client, run_id, "loss")] == list(range(1, 50))
    assert not list((tmp_path / "tracking-buffer").iterdir())


def test_what_nobody_takes_holds_the_checkpoint_up(
    uri: str, run_id: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's keys have expired while MLflow is away: nothing is lost, but nothing counts."""
    tracker = MlflowTracker(uri, run_id, str(tmp_path))
    client.delete_run(run_id)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", _refuse)
        tracker.log_metrics({"loss": 1.0}, 1)
        with pytest.raises(OSError, match="MLflow is away, and what it lacks can't be kept"):
            tracker.keep()
    tracker.keep()
    assert len(list((tmp_path / "tracking-buffer").iterdir())) == 1
    client.restore_run(run_id)
    tracker.close()
    assert deliver_kept(uri, run_id, str(tmp_path)) is None
    assert _points(client, run_id, "loss") == [(1, 1.0)]


def _refuse(uri: str, content: bytes) -> None:
    raise PermissionError(f"ExpiredToken: {uri}")


def test_a_metric_that_the_server_refuses_holds_up_no_other(
    uri: str, run_id: str, client: Any, tmp_path: Path
) -> None:
    tracker = MlflowTracker(uri, run_id, str(tmp_path))
    for step in range(1, 6):
        tracker.log_metrics({"loss": 1.0}, step)
        tracker.log_metrics({"no/../such:name?" * 30: 1.0}, step)
    assert tracker.close() is None
    assert [step for step, _ in _points(client, run_id, "loss")] == [1, 2, 3, 4, 5]
    assert "of metrics, refused" in client.get_run(run_id).data.tags["event.tracking-lost"]


def test_a_deleted_experiment_is_named(uri: str, client: Any) -> None:
    run_id = start(uri, "old", "emoji", {}, {})
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(ValueError, match="experiment 'old' .* was deleted"):
        start(uri, "old", "emoji", {}, {})


def test_flatten_params_cuts_and_keeps_types_readable() -> None:
    flat = flatten_params({"a": {"b": {"c": True}}, "d": [1, "x"], "e": "y" * 6001, "f": {}})
    assert flat["a.b.c"] == "true"
    assert flat["d"] == "[1, x]"
    assert flat["e"] == "y" * 5999 + "…"
    assert "f" not in flat
    assert len(flatten_params({"long": list(range(5000))})["long"]) == 6000


def test_system_metrics_have_the_names_that_mlflow_shows() -> None:
    system = SystemMetrics("10.0.0.7")
    first, second = system.read(), system.read()
    assert first.keys() == second.keys()
    assert all(name.startswith("system/10.0.0.7/") for name in first)
    assert 0 < second["system/10.0.0.7/system_memory_usage_percentage"] <= 100
    assert "system/10.0.0.7/cpu_utilization_percentage" in second


def test_a_machines_name_that_mlflow_refuses_is_made_one_that_it_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for name in SystemMetrics("fe80::1%eth0/../ä").read():
        _validate_metric_name(name)
        assert name.startswith("system/fe80-1-eth0-..-")


def test_telemetry_is_off(uri: str, run_id: str, tmp_path: Path) -> None:
    MlflowTracker(uri, run_id, str(tmp_path)).close()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_connection_changes_mlflows_limits_but_not_the_environment(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`setenv` in the writer's thread crashed workers whose train loop was in C's `getenv`."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    def refuse(*args: object) -> None:
        raise AssertionError(f"the environment was changed: {args}")

    for name in (RETRIES.name, TIMEOUT.name):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "putenv", refuse)
        connect(uri, request_seconds=7)
        assert (TIMEOUT.get(), RETRIES.get()) == (7, 0)
        connect(uri)
        assert (TIMEOUT.get(), RETRIES.get()) == (20, 0)
    monkeypatch.setenv(TIMEOUT.name, "99")  # a user's own
    connect(uri)
    assert TIMEOUT.get() == 99


def test_the_null_tracker_takes_every_call(tmp_path: Path) -> None:
    tracker: Tracker = NullTracker()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_summary({"loss": 1.0}, 1)
    tracker.log_image(Image.new("RGB", (1, 1)), "x", 1)
    tracker.log_start(0, 2, "start")
    tracker.log_artifact("absent")
    tracker.event("a", "b")
    tracker.keep()
    assert tracker.close() is None
    assert list(tmp_path.iterdir()) == []


def test_both_trackers_fit_the_protocol(uri: str, run_id: str, tmp_path: Path) -> None:
    tracker: Tracker = MlflowTracker(uri, run_id, str(tmp_path))
    tracker.close()
    null: Tracker = NullTracker()
    names = {name for name in vars(Tracker) if not name.startswith("_")}
    assert names <= set(dir(tracker)) & set(dir(null))
