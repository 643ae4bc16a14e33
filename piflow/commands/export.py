"""checkpoint -> adapter folder, and an MLflow model version with its lineage; or a whole student.

RUN_DIR/adapter    what goes onto the base; registered in MLflow
RUN_DIR/comfyui    the adapter as one file, for ComfyUI's π-Flow nodes
RUN_DIR/merged     the student with all its weights; fp8, gguf: the same, packed
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from piflow.config import Recipe
from piflow.config.model import GgufType

if TYPE_CHECKING:
    from piflow.runs.folder import RunRecord
    from piflow.runs.registry import Served

ALIAS = "newest"


def whole(
    recipe: Recipe,
    kind: Literal["merged", "fp8", "gguf"],
    *,
    checkpoint: str | None = None,
    out: str | None = None,
    weights: Literal["ema", "student"] = "ema",
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    gguf_type: GgufType = "Q8_0",
    quality: bool = True,
) -> str:
    """Write a checkpoint's student with all its weights. MLflow isn't told.

    Args:
        checkpoint: URI; default: the run's newest.
        out: folder, empty or of an earlier export; default: RUN_DIR/KIND.
        quality: whether its velocities are compared with the adapter's.

    Returns:
        The folder.

    Raises:
        ValueError: as `main`; or a folder with other files, or a family that has no such students.
    """
    from piflow import storage
    from piflow.inference.drawing import choose_device
    from piflow.training.export import with_base
    from piflow.training.export_whole import REPORT, export_whole
    from piflow.training.fidelity import measure

    source = _source(recipe, checkpoint, weights)
    folder = out or storage.join(recipe.run_dir, kind)
    written = export_whole(
        recipe,
        source.checkpoint,
        folder,
        kind=kind,
        weights=weights,
        dtype=dtype,
        lineage=source.lineage,
        manifest_hash=source.record.manifest_hash,
        base_commit=source.record.base_commit,
        gguf_type=gguf_type,
    )
    report: dict[str, Any] = {"format": kind, "dtype": dtype, "files": written.files}
    report["lineage"] = source.lineage
    if kind == "gguf":
        report |= {"dtype": "float32", "gguf_type": gguf_type}
    place = storage.join(folder, REPORT)
    storage.write_bytes(place, _json(report))
    print(f"student written to {folder} ({kind}, {len(written.files)} files of weights)")
    if quality:
        found = measure(
            with_base(recipe, source.record.base_commit),
            written.student,
            folder,
            choose_device("auto"),
        )
        storage.write_bytes(place, _json({**report, "quality": asdict(found)}))
        print(found)
    if not written.is_pipeline:
        print(
            "VAE and text encoder aren't in it, since the base isn't part of a diffusers pipeline "
            "that has the recipe's; sampling finds them as it does for the adapter"
        )
    return folder


def comfyui(
    recipe: Recipe,
    *,
    checkpoint: str | None = None,
    out: str | None = None,
    weights: Literal["ema", "student"] = "ema",
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
) -> str:
    """Write a checkpoint as the file that ComfyUI's π-Flow nodes load. MLflow isn't told.

    Args:
        out: folder; default: RUN_DIR/comfyui.

    Returns:
        The file.

    Raises:
        ValueError: as `main`; or a student that the nodes can't hold.
    """
    from piflow import storage
    from piflow.training.comfyui import export_comfyui, require_readable

    require_readable(recipe)
    source = _source(recipe, checkpoint, weights)
    file = export_comfyui(
        recipe,
        source.checkpoint,
        out or storage.join(recipe.run_dir, "comfyui"),
        weights=weights,
        dtype=dtype,
        lineage=source.lineage,
        manifest_hash=source.record.manifest_hash,
        base_commit=source.record.base_commit,
    )
    print(f"written to {file}: copy it to ComfyUI's models/loras")
    return file


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    record: RunRecord
    checkpoint: str
    lineage: dict[str, str]


def _source(
    recipe: Recipe, checkpoint: str | None, weights: str, record: RunRecord | None = None
) -> _Source:
    """The run's checkpoint, and what its export says of where it came from.

    Args:
        record: of the run, if it was read before.
    """
    from piflow import storage
    from piflow.runs import folder as run_folder
    from piflow.runs.promotion import CHECKPOINT_SHA_TAG, CHECKPOINT_TAG, RECIPE_TAG, WEIGHTS_TAG
    from piflow.training.checkpoint import STATE_FILE
    from piflow.training.preflight import base_fingerprint

    record = record or run_folder.require_run(recipe)
    run_folder.require_same_base(recipe, record, base_fingerprint(recipe))
    checkpoint = checkpoint or run_folder.newest_checkpoint(recipe.run_dir)
    lineage = {
        "piflow.run_id": record.mlflow_run_id,
        RECIPE_TAG: recipe.hash(),
        "piflow.manifest_hash": record.manifest_hash,
        CHECKPOINT_TAG: storage.base_name(checkpoint),
        CHECKPOINT_SHA_TAG: storage.sha256(storage.join(checkpoint, STATE_FILE)),
        WEIGHTS_TAG: weights,
    }
    return _Source(record, checkpoint, lineage)


def main(
    recipe: Recipe,
    *,
    checkpoint: str | None = None,
    out: str | None = None,
    weights: Literal["ema", "student"] = "ema",
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
) -> tuple[str, str]:
    """Export and register a checkpoint.

    Args:
        checkpoint: URI; default: the run's newest.
        out: adapter folder; default: RUN_DIR/adapter.

    Returns:
        The adapter folder and the model version.

    Raises:
        ValueError: no run or checkpoint, or they belong to another recipe or base weights; or the
            run is tracked by a server that the recipe doesn't name.
    """
    from piflow import storage
    from piflow.runs import folder as run_folder
    from piflow.runs import origin
    from piflow.runs.registry import register_adapter
    from piflow.runs.tracking import deliver_kept, place_of
    from piflow.training.checkpoint import read_state
    from piflow.training.export import export_adapter

    record = run_folder.require_run(recipe)
    uri = place_of(recipe, record)  # a refusal comes before the work
    source = _source(recipe, checkpoint, weights, record)
    checkpoint, lineage = source.checkpoint, source.lineage
    folder = out or storage.join(recipe.run_dir, "adapter")
    export_adapter(
        recipe,
        checkpoint,
        folder,
        weights=weights,
        dtype=dtype,
        lineage=lineage,
        manifest_hash=record.manifest_hash,
        base_commit=record.base_commit,
    )
    name = recipe.tracking.model_name or recipe.name
    deliver_kept(uri, record.mlflow_run_id, recipe.run_dir)
    version = register_adapter(
        uri,
        record.mlflow_run_id,
        storage.local_folder(folder),
        name,
        lineage,
        ALIAS,
        served_by_mlflow(
            _uris(recipe),
            origin.description(recipe, record.manifest_hash),
            read_state(checkpoint).step,
        ),
    )
    print(f"adapter written to {folder}; MLflow model {name}, version {version} ({ALIAS})")
    return folder, version


def served_by_mlflow(allowed: list[str], description: str, step: int) -> Served:
    """How MLflow loads an adapter of piflow's.

    Args:
        allowed: URIs that the adapter may name.
        description: of the version, Markdown.
        step: optimiser steps behind it.
    """
    from piflow.inference import served
    from piflow.runs.registry import Served

    return Served(
        code=Path(served.__file__).with_name("mlflow_model.py"),
        config={"base": None, "encoder": None, "allowed": allowed, "device": "auto"},
        params={"seed": 0, "nfe": served.TRAINED_NFE},
        description=description,
        step=step,
    )


def _uris(recipe: Recipe) -> list[str]:
    """What the recipe names that means the same on every machine: no local folders."""
    from piflow import storage
    from piflow.inference.settings import places_of

    return [place for place in places_of(recipe) if storage.scheme(place) != "file"]
