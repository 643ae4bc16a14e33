"""Adapters in MLflow's registry: a model that loads, its version, and the aliases of that."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piflow.runs import logged
from piflow.runs.mlflow import TAG_LENGTH, answered, connect, cut, explained, get_run, in_time
from piflow.storage.foreign import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

ADAPTER = "adapter"  # an artifact of the model, and its folder
_UPLOAD_SECONDS = 600  # a request with an adapter's files, which a server may pass on to S3
_ALIAS = re.compile(r"[\w-]{1,255}", re.ASCII)
_VERSION = re.compile(r"[vV]\d+")
_PACKAGES = ("piflow", "torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Served:
    """How MLflow loads an adapter, and what it says of it.

    Attributes:
        code: the file that MLflow runs to make the model ("models from code").
        config: what that code may be told, with its defaults; a caller can change it.
        example: a prompt.
        params: of a prediction, with their defaults.
        description: of the version, Markdown.
        step: optimiser steps behind the adapter.
    """

    code: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    example: str = "a red heart"
    params: Mapping[str, int] = field(default_factory=dict)
    description: str = ""
    step: int = 0


def register_adapter(
    uri: str,
    run_id: str,
    folder: Path,
    name: str,
    tags: Mapping[str, str],
    alias: str,
    served: Served,
) -> str:
    """Log an adapter folder as a model of its run, register it and point ``alias`` at the version.

    The model is named after the adapter's content, so that no version's files ever change;
    registering the same files of the same run again gives the version that is there.

    Args:
        folder: local folder of the exported adapter.
        name: registered model; created when missing.
        tags: of the version: its lineage.
        alias: such as "newest" (MLflow keeps "latest" for itself); moved from the version that had
            it.

    Returns:
        The version, a number as MLflow writes it ("1").

    Raises:
        ConnectionError: the server doesn't answer.
        ValueError: the folder is missing or empty, the server doesn't hold ``run_id``, has no
            registry or refuses, or the alias is reserved.
    """
    require_alias(alias)
    require_name(name)
    content = _content_hash(folder)
    client = connect(uri, request_seconds=_UPLOAD_SECONDS)
    answered(lambda: get_run(client, uri, run_id), uri)
    with registry_of(uri):  # before anything is uploaded
        present = in_time(lambda: client.search_registered_models(f"name = '{name}'"), uri)
    with explained(uri):

        def fill(model: LoggedModel, scratch: Path) -> None:
            _write_model(scratch, folder, served, model)

        model = logged.find_or_make(
            client, run_id, f"adapter-{content}", served.step, logged.ADAPTER_TYPE, tags, fill
        )
        if not present:
            _create(client, name)
        number = _version_of(client, uri, name, run_id, model, served.description)
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, cut(value, TAG_LENGTH))
        client.set_registered_model_alias(name, alias, number)
    return number


def _create(client: MlflowClient, name: str) -> None:
    """Make the registered model, unless another run just did."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def require_alias(alias: str) -> None:
    """Refuse an alias that MLflow doesn't take or keeps for itself.

    Raises:
        ValueError: says which may be used.
    """
    if not _ALIAS.fullmatch(alias):
        raise ValueError(
            f"expected an alias of letters, digits, '-' and '_', at most 255, got {shown(alias)!r}"
        )
    if alias.lower() == "latest" or _VERSION.fullmatch(alias):
        raise ValueError(
            f'MLflow reserves the alias {alias!r} ("latest", and versions such as v1); use '
            'another, such as "champion"'
        )


def require_name(name: str) -> None:
    """Refuse a registered model's name that can't stand in a search.

    Raises:
        ValueError: it holds a quote.
    """
    if "'" in name:
        raise ValueError(f"a registered model's name can't hold a quote, got {name!r}")


@contextmanager
def registry_of(uri: str) -> Iterator[None]:
    """The first question to a server's registry: one without a registry is told as such.

    Raises:
        ValueError: there is none, or it refuses.
        ConnectionError: the server is away.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except ValueError as error:
        cause = error.__cause__
        missing = isinstance(cause, MlflowException) and cause.get_http_status_code() == 404
        if not missing:
            raise
        raise ValueError(
            f"the MLflow server {uri} has no model registry ({error}); use one with a database "
            "(mlflow server --backend-store-uri postgresql://… or sqlite:///…)"
        ) from error


def _version_of(
    client: MlflowClient, uri: str, name: str, run_id: str, model: LoggedModel, description: str
) -> str:
    """The registered version of a logged model, made when missing."""
    for item in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if item.source in (f"models:/{model.model_id}", model.artifact_location):
            return str(item.version)
    # without a server MLflow would look models:/ up in the process's own store, not in this one
    through_server = uri.startswith(("http://", "https://"))
    source = f"models:/{model.model_id}" if through_server else model.artifact_location
    made = client.create_model_version(
        name, source=source, run_id=run_id, model_id=model.model_id, description=description
    )
    return str(made.version)


def _write_model(scratch: Path, adapter: Path, served: Served, model: LoggedModel) -> None:
    """MLflow's folder of a Python model, which holds no path of this machine."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    prompts, pictures = Schema([ColSpec("string")]), Schema([ColSpec("binary")])
    params = ParamSchema([ParamSpec(key, "long", value) for key, value in served.params.items()])
    folder = scratch / "made"
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(served.code),
        signature=ModelSignature(prompts, pictures, params),
        input_example=([served.example], dict(served.params)),
        pip_requirements=_requirements(),
        model_config=dict(served.config),
    )
    for item in list(folder.iterdir()):
        shutil.move(item, scratch / item.name)
    folder.rmdir()
    shutil.copytree(adapter, scratch / "artifacts" / ADAPTER)
    written = Model.load(str(scratch))
    written.model_id, written.run_id = model.model_id, model.source_run_id
    flavor = written.flavors["python_function"]
    place = f"artifacts/{ADAPTER}"
    flavor["artifacts"] = {ADAPTER: {"path": place, "uri": place}}
    flavor["model_code_path"] = served.code.name
    written.save(str(scratch / "MLmodel"))


def _requirements() -> list[str]:
    """What drew the pictures here, pinned; a build's suffix ("+cpu") is no version elsewhere."""
    pinned = []
    for package in _PACKAGES:
        try:
            pinned.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            logging.getLogger(__name__).info("%s isn't installed, and isn't pinned", package)
    return pinned


def _content_hash(folder: Path) -> str:
    """16 hexadecimal digits of SHA-256 over the folder's files: names, sizes, contents."""
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    if not files:
        raise ValueError(f"no adapter at {folder}: the folder is missing or empty; export first")
    digest = hashlib.sha256()
    for item in files:
        digest.update(f"{item.relative_to(folder).as_posix()}\0{item.stat().st_size}\0".encode())
        with item.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
