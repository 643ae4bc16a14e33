"""A prediction beside a run, in a real MLflow store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piflow.runs.origin import NOTE
from piflow.runs.predicted import Measured, Workers
from piflow.runs.tracking import MlflowTracker, default_tracking_uri, start
from piflow.runtime import predicting as module
from piflow.runtime.predicting import predicting
from tests.unit.runs.test_predicted import PREDICTION

mlflow = pytest.importorskip("mlflow")

WORKERS = Workers(None, 0, 8, 8, 8, "fsdp", 100, {}, [])
MEASURED = Measured(steps=49, step_seconds=2.5, trained=1_000_000)


class Run:
    """One in a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.uri = default_tracking_uri(self.folder)
        self.run_id = start(self.uri, "piflow", "planned", {}, {})
        self.client: Any = mlflow.MlflowClient(tracking_uri=self.uri)

    def tell(self, *told: Workers | Measured) -> None:
        """As a driver does."""
        tracker = MlflowTracker(self.uri, self.run_id, self.folder)
        with predicting(self.folder, tracker, lambda plan: f"A run.\n\n{plan}") as figures:
            for item in told:
                figures(item)
        assert tracker.close() is None

    @property
    def tags(self) -> dict[str, str]:
        return dict(self.client.get_run(self.run_id).data.tags)

    def steps(self, metric: str) -> list[int]:
        return [point.step for point in self.client.get_metric_history(self.run_id, metric)]

    def text(self, name: str, folder: Path) -> str:
        return Path(self.client.download_artifacts(self.run_id, name, str(folder))).read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def test_a_prediction_is_logged_once_and_what_is_measured_beside_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that start again at the same step add no point; those of a later step do."""
    monkeypatch.setattr(module, "predict", lambda workers: replace(PREDICTION, start=workers.start))
    run.tell(WORKERS)
    assert "| seconds a step | 2 | – | – |" in run.tags[NOTE]
    run.tell(WORKERS, MEASURED)
    assert run.steps("plan/step_seconds") == run.steps("plan/peak_memory_gib") == [100]
    assert run.tags[NOTE].startswith("A run.\n\n| 8 × NVIDIA H100 80GB HBM3, fsdp |")
    assert "| seconds a step | 2 | 2.5 | 1.25 |" in run.tags[NOTE]
    assert json.loads(run.text("plan/plan.json", tmp_path))["measured"]["steps"] == 49
    assert "| weights | 3 |" in run.text("plan/plan.md", tmp_path)
    run.tell(replace(WORKERS, start=200))
    assert run.steps("plan/step_seconds") == [100, 200]
    assert json.loads(run.text("plan/plan.json", tmp_path))["measured"] is None


def test_a_plan_that_cannot_be_made_is_told_and_stops_nothing(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The recipe of these workers is empty; what they measure afterwards isn't compared."""
    before = run.tags.get(NOTE)
    run.tell(WORKERS, MEASURED)
    assert "no plan is kept beside this run: ValidationError" in run.tags["event.plan"]
    assert "no plan is kept" in caplog.text and "Traceback" not in caplog.text
    assert run.tags.get(NOTE) == before


def test_a_folder_that_refuses_is_told_and_stops_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(module, "predict", lambda workers: PREDICTION)
    monkeypatch.setattr(module.predicted, "write", refuse)
    run.tell(replace(WORKERS, start=300))
    assert "OSError: no room" in run.tags["event.plan"]
    assert "Traceback" in caplog.text


def test_workers_that_have_gone_are_not_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others had started already."""
    counted: list[int] = []

    def predict(workers: Workers) -> Any:
        counted.append(workers.start)
        return replace(PREDICTION, start=workers.start)

    monkeypatch.setattr(module, "predict", predict)
    with module._counting:
        tracker = MlflowTracker(run.uri, run.run_id, run.folder)
        predictions = module._Predictions(run.folder, tracker, str)
        predictions.take(replace(WORKERS, start=400))
        predictions.take(replace(WORKERS, start=500))
    predictions.close(10)
    tracker.close()
    assert counted == [500]
