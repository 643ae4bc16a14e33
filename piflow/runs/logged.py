"""A run's datasets and models in MLflow, each once, however often one is asked for.

A dataset is known by its name and digest, a model by its run and name. MLflow itself takes a
dataset's second input for the first one; models and a run's outputs are looked up before they are
made. One process at a time delivers for a run (see `piflow.runs.outbox` and `piflow.runs.lease`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from piflow import storage
from piflow.storage.scratch import scratch

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

Context = Literal["training", "evaluation"]

DIGEST_LENGTH = 36  # MLflow's limit, in characters
CHECKPOINT_TYPE = "piflow-checkpoint"
ADAPTER_TYPE = "piflow-adapter"
_STEP_TAG = "piflow.step"
_PAGE = 100  # models asked for at once


def dataset_entry(
    name: str, uri: str, digest: str, context: Context, profile: Mapping[str, Any]
) -> dict[str, Any]:
    """What an outbox keeps of a dataset.

    Args:
        digest: hexadecimal, of the content; MLflow shows the first 36 digits.
        profile: what else is known, such as rows and picture sizes; holds the whole digest too.
    """
    return {
        "name": name[:500],
        "uri": uri,
        "digest": digest[:DIGEST_LENGTH],
        "context": context,
        "profile": {**profile, "digest": digest},
    }


def log_dataset(client: MlflowClient, run_id: str, step: int, data: Mapping[str, Any]) -> None:
    """Name a dataset as the run's input: its place, content's hash and size, not its rows."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    kind = storage.scheme(data["uri"])
    dataset = Dataset(
        name=data["name"],
        digest=data["digest"],
        source_type="local" if kind == "file" else kind,
        source=json.dumps({"uri": data["uri"]}),
        profile=json.dumps(data["profile"]),
    )
    tags = [InputTag(MLFLOW_DATASET_CONTEXT, data["context"])]
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])


def log_checkpoint(client: MlflowClient, run_id: str, step: int, data: Mapping[str, Any]) -> None:
    """Make a checkpoint a model of the run: it stays where it lies, and MLflow knows the place."""
    from mlflow.models.utils import get_external_mlflow_model_spec
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    def upload(model: LoggedModel, folder: Path) -> None:
        get_external_mlflow_model_spec(model).save(str(folder / "MLmodel"))

    tags = {"piflow.uri": data["uri"], MLFLOW_MODEL_IS_EXTERNAL: "true", **data["tags"]}
    find_or_make(client, run_id, data["name"], step, CHECKPOINT_TYPE, tags, upload)


def forget_checkpoints(
    client: MlflowClient, run_id: str, step: int, data: Mapping[str, Any]
) -> None:
    """Delete the models of checkpoints up to `step` that retention has deleted."""
    for model in _models(client, run_id):
        of_step = int(model.tags.get(_STEP_TAG, -1))
        if model.model_type == CHECKPOINT_TYPE and of_step <= step:
            if model.name not in data["kept"]:
                client.delete_logged_model(model.model_id)


def find_or_make(
    client: MlflowClient,
    run_id: str,
    name: str,
    step: int,
    model_type: str,
    tags: Mapping[str, str],
    fill: Any,
) -> LoggedModel:
    """The run's model of this name, finished and among the run's outputs.

    Args:
        step: optimiser steps behind it.
        fill: (model, empty folder) -> None: writes the model's files, the first of them MLmodel.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    model = find_model(client, run_id, name)
    if model is None:
        experiment = client.get_run(run_id).info.experiment_id
        noted = {_STEP_TAG: str(step), **tags}
        model = client.create_logged_model(
            experiment, name=name, source_run_id=run_id, tags=noted, model_type=model_type
        )
    if model.status != LoggedModelStatus.READY:
        with scratch("model") as folder:
            fill(model, folder)
            client.log_model_artifacts(model.model_id, str(folder))
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = client.get_run(run_id).outputs
    known = {item.model_id for item in outputs.model_outputs} if outputs else set()
    if model.model_id not in known:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    return model


def find_model(client: MlflowClient, run_id: str, name: str) -> LoggedModel | None:
    """The run's model of this name, if there is one."""
    return next((model for model in _models(client, run_id) if model.name == name), None)


def _models(client: MlflowClient, run_id: str) -> list[LoggedModel]:
    """All of a run's models that weren't deleted."""
    experiment = client.get_run(run_id).info.experiment_id
    found: list[LoggedModel] = []
    token = None
    while True:
        page = client.search_logged_models(
            [experiment],
            filter_string=f"source_run_id = '{run_id}'",
            max_results=_PAGE,
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            return found
