"""Datasets, checkpoints and adapters in a real MLflow store, each once however often delivered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from piflow.runs.logged import CHECKPOINT_TYPE
from piflow.runs.mlflow import Delivery
from piflow.runs.origin import origin
from piflow.runs.outbox import Entry
from piflow.runs.registry import Served, register_adapter
from piflow.runs.tracking import MlflowTracker, default_tracking_uri, start

mlflow = pytest.importorskip("mlflow")

CODE = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        weights = open(context.artifacts["adapter"] + "/weights", "rb").read()
        return [f"{text} {params}".encode() + weights for text in model_input.iloc[:, 0]]

set_model(Echo())
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_tracking_uri(str(tmp_path_factory.mktemp("run")))


@pytest.fixture
def run_id(uri: str) -> str:
    return start(uri, "piflow", "emoji", {"name": "emoji"}, origin())


@pytest.fixture
def client(uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    code = tmp_path / "echo.py"
    code.write_text(CODE)
    return Served(code, params={"seed": 0}, description="**what**", step=4)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "an adapter"
    folder.mkdir()
    (folder / "weights").write_bytes(b"first")
    return folder


def _entries(run_dir: Path) -> list[Entry]:
    """What a tracker puts for a dataset, two checkpoints of which one goes, and a measurement."""
    put: list[Entry] = []
    tracker = MlflowTracker.__new__(MlflowTracker)
    tracker._run_dir = str(run_dir)
    tracker._outbox = type("Box", (), {"put": staticmethod(put.append)})()  # type: ignore[assignment]
    tracker.log_dataset("store", "s3://b/store", "ab" * 32, "training", {"rows": 9})
    prompts = tracker.log_dataset("prompts", "p.txt", "cd" * 32, "evaluation", {"rows": 2})
    for step, kept in ((2, [2]), (4, [4])):
        tracker.log_checkpoint(step, {"piflow.recipe_hash": "1234"})
        tracker.keep_checkpoints(step, kept)
    tracker.log_summary({"eval/psnr_gain_db": 1.5}, 4, prompts)
    return put


def test_replayed_entries_leave_one_dataset_and_one_model_each(
    uri: str, run_id: str, client: Any, tmp_path: Path
) -> None:
    """Every prefix is delivered before all is, as after kills at any moment."""
    entries = _entries(tmp_path)
    for end in range(1, len(entries) + 1):
        delivery = Delivery(uri, run_id, str(tmp_path))
        for entry in entries[:end]:
            assert delivery([entry]) == 1
    run = client.get_run(run_id)
    inputs = {tag.value: item.dataset for item in run.inputs.dataset_inputs for tag in item.tags}
    assert inputs.keys() == {"training", "evaluation"} and len(run.inputs.dataset_inputs) == 2
    store = inputs["training"]
    assert (store.name, store.digest) == ("store", ("ab" * 32)[:36])
    assert json.loads(store.source) == {"uri": "s3://b/store"} and store.source_type == "s3"
    assert json.loads(store.profile) == {"rows": 9, "digest": "ab" * 32}

    experiment = run.info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert [model.name for model in models] == ["step_00000004"]
    (model,) = models
    assert model.model_type == CHECKPOINT_TYPE and str(model.status).endswith("READY")
    place = tmp_path / "checkpoints" / "step_00000004"
    assert model.tags["piflow.uri"] == str(place), "where it lies; nothing was uploaded"
    assert [item.model_id for item in run.outputs.model_outputs].count(model.model_id) == 1
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.step) == ("eval/psnr_gain_db", 1.5, 4)
    assert (metric.dataset_name, metric.dataset_digest) == ("prompts", ("cd" * 32)[:36])


def test_a_registered_adapter_loads_and_says_where_it_is_from(
    uri: str, run_id: str, client: Any, adapter: Path, served: Served, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tags = {"recipe_hash": "abc"}
    for _ in range(2):  # the same files are the same version
        assert register_adapter(uri, run_id, adapter, "emoji-flux", tags, "newest", served) == "1"
    (adapter / "weights").write_bytes(b"second")
    assert register_adapter(uri, run_id, adapter, "emoji-flux", {}, "newest", served) == "2"

    version = client.get_model_version_by_alias("emoji-flux", "newest")
    assert int(version.version) == 2 and version.run_id == run_id
    assert client.get_model_version("emoji-flux", "1").tags == tags
    assert version.description == "**what**"
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert len(models) == 2 and {item.model_type for item in models} == {"piflow-adapter"}
    model = next(item for item in models if item.artifact_location == version.source)
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [item.model_id for item in outputs].count(model.model_id) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    monkeypatch.chdir(tmp_path)
    for number, content in (("1", b"first"), ("2", b"second")):
        loaded = mlflow.pyfunc.load_model(f"models:/emoji-flux/{number}")
        assert loaded.predict(["a heart"], params={"seed": 3}) == [b"a heart {'seed': 3}" + content]
    folder = Path(mlflow.artifacts.download_artifacts("models:/emoji-flux@newest"))
    text = (folder / "MLmodel").read_text()
    assert str(adapter.parent) not in text and str(Path.cwd()) not in text
    assert yaml.safe_load(text)["flavors"]["python_function"]["model_code_path"] == "echo.py"
    requirements = (folder / "requirements.txt").read_text()
    assert "piflow==" in requirements and "torch==" in requirements and "+cpu" not in requirements
    assert (folder / "artifacts" / "adapter" / "weights").read_bytes() == b"second"


def test_nothing_is_registered_of_what_cant_be(
    uri: str, run_id: str, client: Any, adapter: Path, served: Served, tmp_path: Path
) -> None:
    def register(folder: Path = adapter, name: str = "no-such", alias: str = "newest") -> str:
        return register_adapter(uri, run_id, folder, name, {}, alias, served)

    with pytest.raises(ValueError, match="missing or empty; export first"):
        register(folder=tmp_path / "absent")
    for alias in ("Latest", "v12"):
        with pytest.raises(ValueError, match="reserves the alias"):
            register(alias=alias)
    with pytest.raises(ValueError, match="expected an alias of letters"):
        register(alias="a b")
    with pytest.raises(ValueError, match="can't hold a quote"):
        register(name="it's")
    assert not client.search_registered_models("name = 'no-such'")
    assert client.get_run(run_id).outputs.model_outputs == []


def test_a_run_says_who_started_what(client: Any, run_id: str) -> None:
    tags = client.get_run(run_id).data.tags
    assert tags["mlflow.user"] and tags["mlflow.source.name"].startswith(Path(sys.argv[0]).name)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["mlflow.source.git.dirty"] in ("true", "false")
