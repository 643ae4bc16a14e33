"""A student from MLflow's registry draws what its adapter's folder draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from piflow.backbones import FluxBackbone
from piflow.commands.export import served_by_mlflow
from piflow.config import GMFlowPolicyConfig
from piflow.inference import PiFluxPipeline, load
from piflow.runs.registry import register_adapter
from piflow.runs.tracking import default_tracking_uri, start

mlflow = pytest.importorskip("mlflow")


def drawn(pipe: Any) -> Any:
    call = {"height": 16, "width": 16, "max_sequence_length": 32, "output_type": "np"}
    generator = torch.Generator().manual_seed(1)
    return pipe("a red heart", generator=generator, **call).images[0]


def test_a_pipeline_is_loaded_by_alias_version_and_model_id(
    flux_base: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = default_tracking_uri(str(tmp_path / "run"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/at/all.db")
    run_id = start(uri, "piflow", "tiny", {}, {})
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    expected = []
    for step, kernels in ((1, 2), (2, 3)):
        policy = GMFlowPolicyConfig(num_gaussians=kernels, logstd_inner_dim=4)
        folder = make_adapter(FluxBackbone, flux_base, policy)
        served = served_by_mlflow([], "what", step)
        number = register_adapter(uri, run_id, folder, "tiny", {}, "newest", served)
        assert number == str(step)
        expected.append(drawn(PiFluxPipeline.from_pretrained(str(flux_base), adapter=str(folder))))
    assert not np.array_equal(*expected)
    client.set_registered_model_alias("tiny", "champion", "1")
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    (model_id,) = (model.model_id for model in models if model.tags["piflow.step"] == "2")
    for model, picture in (
        ("models:/tiny@champion", expected[0]),
        ("models:/tiny@newest", expected[1]),
        ("models:/tiny/1", expected[0]),
        (f"models:/{model_id}", expected[1]),
    ):
        pipe = load(model, str(flux_base), tracking_uri=uri)
        assert type(pipe) is PiFluxPipeline
        assert np.array_equal(drawn(pipe), picture), model
    with pytest.raises(ValueError, match="Registered model alias staging not found"):
        load("models:/tiny@staging", str(flux_base), tracking_uri=uri)
