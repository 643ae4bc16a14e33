"""A teacher in one safetensors file, in the layout of its authors or of ComfyUI, as its diffusers
class names and shapes its tensors.

diffusers' own converter of the class is run on numbers of rows in place of values. What comes out
says which rows of the file each tensor is made of, so that no value is read before it is wanted:

    header ── rows' numbers ── diffusers' converter ── runs of rows ── places in the file
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from torch import Tensor

from piflow import storage
from piflow.backbones.load import DTYPES, family_class
from piflow.backbones.transformer import (
    TransformerBackbone,
    check_weights,
    kept_in_float32,
    read_model_config,
)
from piflow.config import find_family
from piflow.sharding.weights import (
    FP8,
    SCALES,
    WEIGHTS_FILE,
    Packed,
    StoredTensor,
    read_tensor,
    tensors_of_file,
    with_scales,
)
from piflow.sharding.written import MAX_SHARD_BYTES, Entry, write_weights
from piflow.storage.foreign import ForeignDataError, parse_object, shown
from piflow.storage.model_folder import LIBRARY_ERRORS, reason

PREFIX = "model.diffusion_model."  # of the transformer's tensors in files with other models beside
OTHER_MODELS = ("text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.")
_OWN_PREFIXES = (PREFIX, "diffusion_model.", "transformer.")
_UNUSED = ("scaled_fp8", "norm_final.weight")  # a mark; a layer that Z-Image doesn't use
_INPUT_SCALES = (".input_scale", ".scale_input")  # for products in 8 bits
_QUANTISED = ".comfy_quant"
_MAX_NOTE_BYTES = 4096
_SHOWN = 3
_CONFIG = "config.json"
_UNFINISHED = "unfinished.txt"  # in the folder that is being written


@dataclass(frozen=True)
class Converted:
    """A diffusers folder that was written from one file.

    Attributes:
        tensors: how many.
        bytes: of all values, as written.
        scaled: how many were in 8 bits with a scale.
        files: name -> sha256.
    """

    tensors: int
    bytes: int
    scaled: int
    files: dict[str, str]


def convert(
    uri: str,
    folder: str,
    family: str,
    *,
    config: str | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Writes a teacher in one file as its diffusers folder, config.json last.

    Values are read as they are written: memory holds a shard of the folder. A folder in which an
    earlier call was stopped has no config.json, so nothing takes it for a model; this one begins
    anew in it.

    Args:
        uri: of the safetensors file: local, s3:// or hf://.
        folder: URI of an empty folder, or one of a call that was stopped.
        family: as a recipe's `model.family`.
        config: URI of the folder of a diffusers transformer of this size, for its config.json;
            None: of the family's best known model.
        dtype: a key of `DTYPES`: of all but what diffusers keeps in float32.

    Raises:
        ValueError: as `single_file_tensors`; a folder that isn't empty, a family whose models
            aren't converted, or a config that isn't its model's.
    """
    _require_own(folder)
    kind: Any = family_class(family)
    if not issubclass(kind, TransformerBackbone):
        raise ValueError(f"models of the family {family} aren't converted: no TransformerBackbone")
    arguments = _arguments(kind, family, config)
    guided = arguments.get("guidance_embeds")
    kind.on_meta(arguments, embedded_guidance=0.0 if guided else None)  # refuses other kinds
    with torch.device("meta"):
        model = kind.model_class.from_config(arguments)
    try:
        stored = single_file_tensors(uri, kind, arguments)
    except ValueError as error:
        published = find_family(family).published
        if config is not None or published is None:
            raise
        raise ValueError(
            f"{error} (Compared with {published.name}: for a model of another size give --config, "
            "the folder of a diffusers transformer of that size)"
        ) from error
    exact = kept_in_float32(model)
    entries = {
        name: Entry(tensor.shape, torch.float32 if name in exact else DTYPES[dtype])
        for name, tensor in stored.items()
    }
    _begin(folder)
    files = write_weights(
        folder, entries, {"format": "pt"}, lambda name: read_tensor(stored[name]),
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    own = {"_class_name": kind.class_name, "_diffusers_version": diffusers_version}
    tree = {name: value for name, value in model.config.items() if not name.startswith("_")}
    text = json.dumps({**own, **tree}, indent=2) + "\n"
    storage.write_bytes(storage.join(folder, _CONFIG), text.encode())
    storage.delete_file(storage.join(folder, _UNFINISHED))
    scaled = sum(tensor.scale is not None for tensor in stored.values())
    return Converted(len(entries), sum(e.bytes for e in entries.values()), scaled, files)


def _require_own(folder: str) -> None:
    """Refuses to write among files that no stopped call wrote.

    Raises:
        ValueError: there are some.
    """
    found = storage.list_files(folder)
    if _UNFINISHED in found:
        found = [name for name in found if not _is_own(name)]
    if found:
        raise ValueError(f"{folder} isn't empty ({found[0]}): give a new folder")


def _is_own(name: str) -> bool:
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    return name in (_CONFIG, _UNFINISHED) or ("/" not in name and name.startswith(stem))


def _begin(folder: str) -> None:
    """Marks the folder as unfinished, and deletes what a stopped call left; config.json first."""
    storage.write_bytes(storage.join(folder, _UNFINISHED), b"piflow convert\n")
    storage.delete_left_over(folder)
    for name in sorted(storage.list_files(folder), key=lambda name: name != _CONFIG):
        if name != _UNFINISHED:
            storage.delete_file(storage.join(folder, name))


def _arguments(kind: type[TransformerBackbone], family: str, config: str | None) -> dict[str, Any]:
    """Constructor arguments of the diffusers class."""
    if config is not None:
        place = str(storage.local_folder(config))
        tree = read_model_config(place, kind.class_name, config)
        return {name: value for name, value in tree.items() if not name.startswith("_")}
    published = find_family(family).published
    if published is None:
        raise ValueError(
            f"the family {family} names no best known model: give --config, the folder of a "
            "diffusers transformer of this size"
        )
    return dict(published.config)


def single_file_tensors(
    uri: str, kind: type[TransformerBackbone], config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Name in the diffusers class -> where its values lie in the file; only the header is read.

    Weights in fp8 have their scale, if the file has scales.

    Args:
        uri: of a safetensors file.
        kind: the family's backbone.
        config: constructor arguments of its diffusers class.

    Raises:
        ValueError: it isn't safetensors, holds LoRA, weights that are quantised otherwise, tensors
            of several layouts, or not this model's.
    """
    stored = _own_tensors(tensors_of_file(uri), uri)
    lora = [name for name in stored if "lora" in name.lower()]
    if lora:
        raise ForeignDataError(
            f"{uri} holds LoRA ({_some(lora)}), which is no teacher by itself: give it as "
            "model.lora beside its base"
        )
    stored = _with_scales(stored, uri)
    with torch.device("meta"):
        expected = kind.model_class.from_config(dict(config)).state_dict()
    found = (
        stored
        if stored.keys() == expected.keys()
        else in_diffusers_layout(stored, kind, config, uri)
    )
    check_weights(found, expected, uri)
    return found


def _own_tensors(stored: dict[str, StoredTensor], uri: str) -> dict[str, StoredTensor]:
    """The transformer's tensors without their common prefix.

    Other models' beside them are left out, if it has a prefix to be told apart by.
    """
    prefix = next((p for p in _OWN_PREFIXES if any(name.startswith(p) for name in stored)), None)
    if prefix is None:
        return stored
    others = [name for name in stored if not name.startswith((prefix, *OTHER_MODELS, *_UNUSED))]
    if others:
        raise ForeignDataError(
            f"{uri} mixes layouts: {_some([n for n in stored if n.startswith(prefix)])} beside "
            f"{_some(others)}: give a file of one model's weights"
        )
    own = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}


def _with_scales(stored: Mapping[str, StoredTensor], uri: str) -> dict[str, StoredTensor]:
    """Without marks and inputs' scales; fp8 weights with their own, if there are any."""
    for name, tensor in stored.items():
        if name.endswith(_QUANTISED):
            _require_fp8(name, tensor)
    dropped = (*_INPUT_SCALES, _QUANTISED)
    kept = {
        name: tensor
        for name, tensor in stored.items()
        if name not in _UNUSED and not name.endswith(dropped)
    }
    if any(name.endswith(SCALES) for name in kept):
        return with_scales(kept)
    known = {torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8}
    strange = [name for name, tensor in kept.items() if tensor.dtype not in known]
    if strange:
        raise ForeignDataError(
            f"{uri} holds quantised weights ({_some(strange)}): give 8 bits with a scale a tensor, "
            "or 16 bits"
        )
    return kept


def _require_fp8(name: str, note: StoredTensor) -> None:
    """Refuses a layer that ComfyUI's note calls quantised otherwise than in 8 bits."""
    size = math.prod(note.shape)
    if note.dtype != torch.uint8 or size > _MAX_NOTE_BYTES:
        raise ForeignDataError(f"{note.uri}: {shown(name)} is no note of a layer's format")
    system, path = storage.filesystem(note.uri)
    with system.open_input_file(path) as file:
        file.seek(note.offset)
        content = bytes(file.read(size))
    kind = parse_object(content, where=f"{note.uri}: {shown(name)}").get("format")
    if kind not in ("float8_e4m3fn", "float8_e5m2"):
        raise ForeignDataError(
            f"{note.uri}: {shown(name)} says {shown(repr(kind))}: of quantised weights those in "
            "fp8 with a scale a tensor are read; give these, or 16 bits"
        )


def in_diffusers_layout(
    stored: Mapping[str, StoredTensor],
    kind: type[TransformerBackbone],
    config: Mapping[str, Any],
    uri: str,
) -> dict[str, StoredTensor]:
    """What diffusers' converter makes of a file's tensors, as rows of them.

    Args:
        stored: by the file's names, without prefix and scales.

    Raises:
        ValueError: the class has no converter, the layout is none that it knows, or tensors are
            left that belong to no part of the model.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Any = SINGLE_FILE_LOADABLE_CLASSES  # annotated as of several kinds
    converter = known.get(kind.class_name, {}).get("checkpoint_mapping_fn")
    if converter is None:
        raise ValueError(f"diffusers converts no other layout to a {kind.class_name}")
    names, starts, numbers = list(stored), [0], {}
    for name, tensor in stored.items():
        end = starts[-1] + (tensor.shape[0] if tensor.shape else 1)
        ids = torch.arange(starts[-1], end)
        numbers[name] = ids.reshape(-1, *[1] * (len(tensor.shape) - 1))
        starts.append(end)
    try:
        made: dict[str, Tensor] = converter(checkpoint=dict(numbers), config=dict(config))
    except LIBRARY_ERRORS as error:
        raise ForeignDataError(
            f"{uri} isn't in a layout that diffusers knows of a {kind.class_name}, or of another "
            f"size than its converter takes: {reason(error)}"
        ) from error
    found, used = {}, set()
    for name, ids in made.items():
        rows = ids.flatten()
        number = bisect_right(starts, int(rows[0])) - 1
        found[name] = _rows(stored[names[number]], rows - starts[number], name)
        used.add(names[number])
    left = [name for name in names if name not in used]
    if left:
        raise ForeignDataError(
            f"{uri} mixes layouts, or holds more than a {kind.class_name}: {_some(left)} belong to "
            "no part of it; give a file of one model's weights"
        )
    return found


def _rows(source: StoredTensor, rows: Tensor, name: str) -> StoredTensor:
    """These rows of a stored tensor, in this order."""
    first, count = int(rows[0]), len(rows)
    total = source.shape[0] if source.shape else 1
    if int(rows.min()) < 0 or int(rows.max()) >= total:
        raise ForeignDataError(
            f"{source.uri}: {shown(name)} would be made of several tensors: convert it by diffusers"
        )
    shape = (count, *source.shape[1:]) if source.shape else ()
    width = math.prod(source.shape[1:])
    if torch.equal(rows, torch.arange(first, first + count)):
        offset = source.offset + first * width * source.dtype.itemsize
        return replace(source, offset=offset, shape=shape)

    def unpacked(content: bytearray) -> Tensor:
        values = torch.frombuffer(content, dtype=source.dtype).reshape(total, width)
        if source.scale is not None:
            values = values.float() * source.scale
        if values.dtype in FP8:  # whose rows PyTorch doesn't pick
            return values.view(torch.uint8)[rows].view(values.dtype)
        return values[rows]

    dtype = source.dtype if source.scale is None else torch.float32
    packed = Packed(total * width * source.dtype.itemsize, unpacked)
    return replace(source, shape=shape, dtype=dtype, scale=None, packed=packed)


def _some(names: list[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return f"{', '.join(map(shown, names[:_SHOWN]))}{more}"
