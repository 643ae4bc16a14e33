"""Students as whole models: base, LoRA and head in one folder, with no adapter and no base beside.

    config.json                         the student's `_class_name`, the base's constructor
                                        arguments, the head's sizes
    diffusion_pytorch_model*.safetensors
                                        the transformer's tensors under diffusers' own names, the
                                        head's in place of the output layer's; in the metadata of
                                        every file what an adapter's says, and which format it is

A DX head lies as the diffusers class would store an output layer of N_g times the channels, so that
class itself loads the folder and returns the policy's values. A Gaussian mixture's head has layers
that no diffusers class has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn

from piflow import storage
from piflow.backbones import Backbone, family_class
from piflow.backbones.transformer import TransformerBackbone, is_of_head, model_tensors
from piflow.config import find_family
from piflow.roles.adapter import (
    CONFIG_FILE,
    FORMAT_KEY,
    GM_OWN,
    POLICY_KEY,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    load_adapter,
)
from piflow.sharding.gguf_file import GGUF_FILE, read_gguf
from piflow.sharding.weights import StoredTensor, fill, missing, read_tensor
from piflow.storage.fingerprint import weights_fingerprint
from piflow.storage.foreign import ForeignDataError, shown
from piflow.storage.model_folder import shard_names
from piflow.storage.tensor_file import read_header

Format = Literal["merged", "fp8", "gguf"]
TRANSFORMER = "transformer"  # the student's folder in that of its pipeline
_PACKED_PATCH = 1  # of models whose patches are packed before them


def student_config(backbone: TransformerBackbone, student: AdapterConfig, family: str) -> bytes:
    """`config.json` of a merged student: the base's own arguments, and what its head changes."""
    own = {"_class_name": student.class_name, "_diffusers_version": diffusers_version}
    packed = {"patch_size": _PACKED_PATCH} if find_family(family).packs_latents else {}
    base = json.loads(json.dumps(backbone.config))
    return (json.dumps({**own, **base, **packed, **student.fields}, indent=2) + "\n").encode()


def head_as_stored(
    backbone: TransformerBackbone, head: Mapping[str, Tensor], student: AdapterConfig
) -> dict[str, Tensor]:
    """A head's tensors by their names and in their order in a merged student's files."""
    return dict(head) if student.clock() is None else backbone.stored_head(head)


def read_student(folder: str) -> Adapter:
    """An adapter, or a merged student, of which the head alone is read.

    Args:
        folder: URI of the folder with config.json; one of a hub must be its local copy.

    Raises:
        ValueError: neither is there, or it is damaged, or in a format that isn't read here.
    """
    metadata = _metadata(folder)
    if FORMAT_KEY not in metadata:
        return load_adapter(folder)
    folder = _local_if_gguf(folder)
    if metadata[FORMAT_KEY] not in get_args(Format):
        raise ForeignDataError(
            f"{folder}: {FORMAT_KEY} is {shown(repr(metadata[FORMAT_KEY]))}, expected one of "
            f"{', '.join(get_args(Format))}: it was exported by a newer piflow"
        )
    place = storage.join(folder, CONFIG_FILE)
    config = AdapterConfig.parse(storage.read_bytes(place), metadata.get(POLICY_KEY), place)
    head = {
        name: read_tensor(stored)
        for name, stored in model_tensors(folder).items()
        if is_of_head(name)
    }
    return Adapter(config, head, metadata, body=folder)


def is_merged(folder: str) -> bool:
    """Whether a folder holds a merged student's transformer, of any format."""
    return FORMAT_KEY in _metadata(folder)


def student_sha256(folder: str) -> str:
    """What tells a student's files from others', for pictures that are kept.

    Of an adapter all bytes count; of a merged student's shards 3 KiB of each tensor, as of a base.
    """
    config = storage.sha256(storage.join(folder, CONFIG_FILE))
    gguf = storage.join(folder, GGUF_FILE)
    if storage.exists(gguf):
        weights: str | None = storage.sha256(gguf)
    elif is_merged(folder):
        weights = weights_fingerprint(folder)
    else:
        weights = storage.sha256(storage.join(folder, WEIGHTS_FILE))
    return hashlib.sha256(f"{config}{weights}".encode()).hexdigest()


def empty_student(
    adapter: Adapter, family: str, dtype: torch.dtype, embedded_guidance: float | None = None
) -> tuple[TransformerBackbone, dict[nn.Parameter, StoredTensor]]:
    """The backbone of a merged student less its values, and where they lie; its head isn't in it.

    Raises:
        ValueError: a family whose students aren't merged, or files that don't fit one another.
    """
    kind, body = _kind(family), _body(adapter)
    module, stored = kind.empty_student(body, base_arguments(adapter, family), dtype=dtype)
    sources = {
        parameter: stored[name] for name, parameter in module.named_parameters() if name in stored
    }
    return kind(module, embedded_guidance=embedded_guidance), sources


def student_backbone(
    adapter: Adapter, family: str, dtype: torch.dtype, embedded_guidance: float | None = None
) -> TransformerBackbone:
    """`empty_student` with its values, on the CPU.

    Raises:
        ValueError: as `empty_student`.
    """
    backbone, sources = empty_student(adapter, family, dtype, embedded_guidance)
    fill(backbone.module, missing(backbone.module, sources), device="cpu")
    return backbone


def student_module(adapter: Adapter, family: str, dtype: torch.dtype) -> nn.Module:
    """The diffusers model of a merged student on the CPU, with NaN for an output layer.

    Raises:
        ValueError: as `empty_student`.
    """
    body = _body(adapter)
    module, stored = _kind(family).empty_student(body, base_arguments(adapter, family), dtype=dtype)
    fill(module, stored, device="cpu")
    return module


def base_arguments(adapter: Adapter, family: str) -> dict[str, Any]:
    """Constructor arguments of the model that a merged student was made from."""
    fields = {name: value for name, value in adapter.config.fields.items() if name not in GM_OWN}
    packed = {"patch_size": _PACKED_PATCH} if find_family(family).packs_latents else {}
    return {**fields, **packed, "out_channels": fields["in_channels"]}


def for_backbone(adapter: Adapter, backbone: Backbone) -> Adapter:
    """The student with a merged one's head as adapters have it; any other as it is.

    Raises:
        ValueError: tensors of the head are missing.
    """
    if adapter.body is None or adapter.config.clock() is None:
        return adapter
    if not isinstance(backbone, TransformerBackbone):
        raise ValueError(f"students of a {backbone.class_name} aren't merged")
    others = {name: t for name, t in adapter.tensors.items() if not is_of_head(name)}
    head = {name: t for name, t in adapter.tensors.items() if is_of_head(name)}
    try:
        return replace(adapter, tensors={**others, **backbone.read_head(head)})
    except KeyError as error:
        raise ForeignDataError(
            f"{adapter.body} lacks {error} of its output layer: export it again"
        ) from None


def _kind(family: str) -> type[TransformerBackbone]:
    kind = family_class(family)
    if not issubclass(kind, TransformerBackbone):
        raise ValueError(f"students of the family {family} aren't merged: export an adapter")
    return kind


def _body(adapter: Adapter) -> str:
    if adapter.body is None:
        raise ValueError("expected a merged student, got an adapter")
    return adapter.body


def _first_file(folder: str) -> str | None:
    """URI of a weights file of a folder, the first if there are several; None: it has none."""
    index = storage.join(folder, f"{WEIGHTS_FILE}.index.json")
    name = WEIGHTS_FILE
    if storage.exists(index):
        name = shard_names(storage.read_bytes(index), index)[0]
    uri = storage.join(folder, name)
    return uri if storage.exists(uri) else None


def _metadata(folder: str) -> dict[str, str]:
    """What a folder's weights say of themselves; {}: it has none."""
    gguf = storage.join(folder, GGUF_FILE)
    if storage.exists(gguf):
        return read_gguf(storage.join(_local_if_gguf(folder), GGUF_FILE))[0]
    first = _first_file(folder)
    if first is None:
        return {}
    try:
        return read_header(first).metadata
    except ForeignDataError as error:
        raise ForeignDataError(f"the adapter is damaged: {error}; export it again") from error


def _local_if_gguf(folder: str) -> str:
    """GGUF's library reads files of this machine alone."""
    remote = storage.on_objects(folder) and storage.exists(storage.join(folder, GGUF_FILE))
    return str(storage.local_folder(folder)) if remote else folder
