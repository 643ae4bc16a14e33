"""A checkpoint as a student that needs neither adapter nor base: merged, or with packed weights.

OUT/transformer/      config.json, the weights' shards (`piflow.roles.merged`)
OUT/vae/, …           the base's pipeline's other parts, where the base is part of one
OUT/model_index.json  makes the folder a pipeline's
OUT/export.json       format, hashes of the weights' files, lineage, how close it is
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piflow import storage
from piflow.backbones.codec import vae_uri
from piflow.config import Recipe
from piflow.config.model import GgufType
from piflow.inference.places import portable
from piflow.inference.settings import SETTINGS_KEY, SamplingSettings, Weights
from piflow.roles.adapter import CONFIG_FILE, DTYPES, FORMAT_KEY, POLICY_KEY
from piflow.roles.merged import TRANSFORMER, Format, student_config
from piflow.sharding.gguf_file import BLOCK, GGUF_FILE, library, write_gguf
from piflow.sharding.written import MAX_SHARD_BYTES, Entry, write_weights
from piflow.storage.scratch import scratch
from piflow.training.export import base_of, stored_in_checkpoint, with_base
from piflow.training.merge import MergedStudent, as_fp8
from piflow.training.pipeline_parts import INDEX, PipelineParts

REPORT = "export.json"
_SCALE = "weight_scale"  # of an fp8 layer, beside its `weight`
_LAYERS_KEY = "_quantization_metadata"  # in the safetensors metadata, as ComfyUI reads it
_LEAST_SIDE = 16  # of a matrix that is worth 8 bits, and that GPUs multiply in them


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        files: of weights, by their paths in the folder -> hex sha256.
        is_pipeline: whether it needs no other folder at all.
        student: what was written; reads its checkpoint and base.
    """

    files: dict[str, str]
    is_pipeline: bool
    student: MergedStudent


def export_whole(
    recipe: Recipe,
    checkpoint: str,
    folder: str,
    *,
    kind: Format,
    weights: Weights,
    dtype: str,
    lineage: dict[str, str],
    manifest_hash: str | None = None,
    base_commit: str | None = None,
    gguf_type: GgufType = "Q8_0",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """Write a checkpoint's student with all its weights.

    The base is read tensor by tensor: memory holds a shard and one tensor. The same checkpoint
    gives the same bytes.

    Args:
        folder: URI; must be empty, or an earlier export, which is replaced.
        kind: "fp8": linear layers of the blocks in float8_e4m3fn; "gguf": in `gguf_type`.
        dtype: of all other tensors; what diffusers keeps in float32, and all of gguf, is in
            float32.
        lineage: strings for the metadata: run, hashes, step.
        manifest_hash, base_commit: as of `export_adapter`.

    Raises:
        ValueError: a folder with other files, a family or recipe whose students aren't merged, or
            a checkpoint that doesn't fit the recipe.
    """
    require_own_folder(folder)
    written, recipe = recipe, with_base(recipe, base_commit)
    stored, _ = stored_in_checkpoint(written, checkpoint, weights, manifest_hash)
    student = MergedStudent.of(recipe, stored)
    pipeline = PipelineParts.of(recipe)
    settings = settings_without_base(recipe, pipeline is not None)
    metadata = {
        "format": "pt",
        FORMAT_KEY: kind,
        POLICY_KEY: json.dumps(student.config.policy_fields),
        SETTINGS_KEY: settings.model_dump_json(),
        "base_model": portable(recipe.model.path),
        **base_of(recipe),
        **lineage,
    }
    place = storage.join(folder, TRANSFORMER)
    if kind == "gguf":
        packed = _packed(student, gguf_type)
        clear(folder)
        hashes = _write_gguf(place, student, packed, metadata, recipe.model.family)
    else:
        content = _Content(student, DTYPES[dtype], kind == "fp8")
        if kind == "fp8":
            metadata[_LAYERS_KEY] = content.layers_json()
        clear(folder)
        hashes = write_weights(
            place, content.entries(), metadata, content.read, max_shard_bytes=max_shard_bytes
        )
    if pipeline is not None:
        pipeline.copy_to(folder, recipe.model.family)
    config = student_config(student.backbone, student.config, recipe.model.family)
    storage.write_bytes(storage.join(place, CONFIG_FILE), config)
    files = {f"{TRANSFORMER}/{name}": digest for name, digest in hashes.items()}
    return Written(files, pipeline is not None, student)


def settings_without_base(recipe: Recipe, has_parts: bool) -> SamplingSettings:
    """The recipe's settings for a student that has all LoRA in its weights.

    Args:
        has_parts: whether VAE and text encoder lie beside it; else the VAE is named.
    """
    settings = SamplingSettings.of(recipe)
    places: dict[str, Any] = {"lora": None}
    if has_parts:
        places["vae"] = "vae"
    elif recipe.model.codec == "vae":
        places["vae"] = portable(vae_uri(recipe.model))
    model = settings.model.model_copy(update=places)
    return settings.model_copy(update={"model": model})


def require_own_folder(folder: str) -> None:
    """Refuses to write among files that no export of ours wrote.

    Raises:
        ValueError: there are some.
    """
    if storage.exists(storage.join(folder, REPORT)):
        storage.delete_left_over(folder)  # of an export that was killed
        return
    found = storage.list_files(folder)
    if found:
        raise ValueError(
            f"{folder} isn't empty ({found[0]}) and no export of piflow's: give an empty folder "
            "with --out"
        )


def clear(folder: str) -> None:
    """Makes an earlier export's folder an unfinished one, without its weights."""
    if not storage.exists(storage.join(folder, REPORT)):
        storage.write_bytes(storage.join(folder, REPORT), b"{}\n")  # from now on it is ours
    storage.delete_file(storage.join(folder, TRANSFORMER, CONFIG_FILE))
    storage.delete_file(storage.join(folder, INDEX))
    storage.delete_folder(storage.join(folder, TRANSFORMER))


def _packed(student: MergedStudent, kind: GgufType) -> dict[str, GgufType]:
    """The weights that are packed: of linear layers in blocks, whose rows hold whole blocks.

    Raises:
        ValueError: there is none, or the library isn't installed.
    """
    library()
    shapes = student.shapes
    found = {
        name: kind
        for name in student.linear
        if shapes[name][-1] % BLOCK == 0 and not student.keeps_float32(name)
    }
    if not found:
        raise ValueError(
            f"no linear layer of this model has a multiple of {BLOCK} columns, which GGUF packs: "
            "export it merged"
        )
    return found


def _write_gguf(
    folder: str,
    student: MergedStudent,
    packed: dict[str, GgufType],
    metadata: dict[str, str],
    architecture: str,
) -> dict[str, str]:
    """The library writes local files: another storage gets a copy."""
    with scratch("gguf") as own:
        file = own / GGUF_FILE
        write_gguf(file, student.shapes, packed, metadata, student.read, architecture=architecture)
        storage.copy_file(str(file), storage.join(folder, GGUF_FILE))
        return {GGUF_FILE: storage.sha256(str(file))}


class _Content:
    """A merged student's tensors, some of them in 8 bits.

    Args:
        dtype: of the others.
        eight_bits: whether linear layers are in fp8.

    Raises:
        ValueError: no layer is large enough for fp8.
    """

    def __init__(self, student: MergedStudent, dtype: torch.dtype, eight_bits: bool) -> None:
        self._student, self._dtype = student, dtype
        shapes = student.shapes
        self._shapes = shapes
        self._small = {
            name
            for name in student.linear
            if eight_bits and min(shapes[name]) >= _LEAST_SIDE and not student.keeps_float32(name)
        }
        self._scales = {_scale_of(name): name for name in self._small}
        if eight_bits and not self._small:
            raise ValueError(
                f"no linear layer of this model has {_LEAST_SIDE} rows and columns: fp8 is for "
                "larger models, export it merged"
            )

    def entries(self) -> dict[str, Entry]:
        found = {name: Entry(shape, self._kind(name)) for name, shape in self._shapes.items()}
        scales = dict.fromkeys(self._scales, Entry((), torch.float32))
        return {**found, **scales}

    def read(self, name: str) -> Tensor:
        """A value; a weight in 8 bits is read for its scale and once more for itself."""
        if name in self._scales:
            return as_fp8(self._student.read(self._scales[name]))[1]
        value = self._student.read(name)
        return as_fp8(value)[0] if name in self._small else value

    def layers_json(self) -> str:
        layers = {name.removesuffix(".weight"): _FP8_LAYER for name in sorted(self._small)}
        return json.dumps({"format_version": "1.0", "layers": layers})

    def _kind(self, name: str) -> torch.dtype:
        if name in self._small:
            return torch.float8_e4m3fn
        return torch.float32 if self._student.keeps_float32(name) else self._dtype


_FP8_LAYER = {"format": "float8_e4m3fn"}


def _scale_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}{_SCALE}"
