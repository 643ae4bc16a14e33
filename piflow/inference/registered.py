"""Students from MLflow's registry as diffusers pipelines."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piflow import storage
from piflow.config import find_family
from piflow.inference.settings import read_adapter
from piflow.roles.adapter import CONFIG_FILE
from piflow.storage.foreign import redacted, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from piflow.inference.base import FewStepPipeline

_SCHEME = "models:/"
_PLACES = ("artifacts/adapter", "adapter", ".")  # of the adapter in what is downloaded


def load(
    model: str,
    base: str | None = None,
    *,
    tracking_uri: str | None = None,
    allowed: Sequence[str] = (),
    **options: Any,
) -> FewStepPipeline:
    """The family's pipeline of a student in MLflow's registry; none of the model's code is run.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``models:/MODEL_ID``.
        base: the family's own pipeline: a folder, URI or hub name. Default: the one that the
            adapter names, if it is on the hub or allowed.
        tracking_uri: of the MLflow server; default: as MLFLOW_TRACKING_URI says.
        allowed: URIs that the adapter may name, with all that lies below them.
        options: of `DiffusionPipeline.from_pretrained`: torch_dtype, device_map …

    Raises:
        ValueError: no such model, not one of piflow's, a family without a pipeline, or a base that
            isn't one.
    """
    adapter = str(download(model, tracking_uri))
    _, settings = read_adapter(adapter, base, allowed=allowed)
    family = find_family(settings.model.family)
    if family.pipeline is None:
        raise ValueError(
            f"{model}: the family {settings.model.family} has no diffusers pipeline; use "
            f"mlflow.pyfunc.load_model({model!r}), or `piflow sample`"
        )
    module, _, name = family.pipeline.partition(":")
    pipeline: type[FewStepPipeline] = getattr(importlib.import_module(module), name)
    whole = base or settings.model.path.removesuffix("/transformer")
    if base is None and not storage.exists(storage.join(whole, "model_index.json")):
        raise ValueError(
            f"{model}: its base {redacted(whole)} is no diffusers pipeline with VAE and text "
            "encoders; say with base= where the family's pipeline lies"
        )
    return pipeline.from_pretrained(whole, adapter=adapter, **options)


def download(model: str, tracking_uri: str | None = None) -> Path:
    """The adapter's folder of a registered model, in a temporary folder of this machine.

    Raises:
        ValueError: not a registry's URI, no such model, or one without an adapter.
        ConnectionError: the server is away.
    """
    if not model.startswith(_SCHEME):
        raise ValueError(
            f"expected a model of MLflow's registry, such as models:/NAME@champion, got "
            f"{shown(repr(model))}"
        )
    import mlflow
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    from piflow.runs.mlflow import explained, require_own_server

    uri = tracking_uri or mlflow.get_tracking_uri()
    client = MlflowClient(uri, tracking_uri or mlflow.get_registry_uri())
    with explained(uri):
        location = _location(client, model.removeprefix(_SCHEME))
        require_own_server(uri, location)
        folder = Path(download_artifacts(artifact_uri=location, tracking_uri=uri))
    for place in _PLACES:
        if (folder / place / CONFIG_FILE).is_file():
            return folder / place
    raise ValueError(f"{model} holds no adapter of piflow's (no {CONFIG_FILE}): export one")


def _location(client: MlflowClient, model: str) -> str:
    """Where the files of NAME@ALIAS, NAME/VERSION or MODEL_ID lie.

    MLflow's own download of ``models:/`` asks the process's registry, whatever registry it is told.
    """
    name, separator, alias = model.rpartition("@")
    if separator:
        version = str(client.get_model_version_by_alias(name, alias).version)
    else:
        name, _, version = model.rpartition("/")
    if name:
        place = str(client.get_model_version_download_uri(name, version))
        if not place.startswith(_SCHEME):
            return place
        model = place.removeprefix(_SCHEME)
    return str(client.get_logged_model(model).artifact_location)
