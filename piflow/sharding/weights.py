"""A model folder's weights, read by rows from its safetensors files, straight to where they go.

    empty model ── adapters, heads ── sharding ── fill
    on "meta"      real, on the CPU               each rank reads the rows that it keeps

Reading is by byte ranges, from local files and object stores alike: nothing is downloaded whole,
nothing is mapped into memory and no disk is used. A rank holds its shards and one buffer of
`BUFFER_BYTES` at a time, however large the files are. torch's own `HuggingFaceStorageReader` opens
each file by safetensors' `safe_open`, which maps local files only: it can't read an object store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from pyarrow import NativeFile
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from piflow import storage
from piflow.sharding.tensors import Part, part_of
from piflow.storage.foreign import shown as escaped
from piflow.storage.model_folder import shard_names
from piflow.storage.tensor_file import read_header

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
BUFFER_BYTES = 16 * 2**20
DTYPES = {  # by `ITEM_BYTES`' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".weight_scale", ".scale_weight")  # endings of the names of fp8 weights' scales


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's values lie.

    Attributes:
        uri: of its file.
        offset: of its first byte in the file; values follow in row-major order, without gaps.
        shape: as stored.
        dtype: as stored.
        scale: what stored values are multiplied by, of fp8 weights that are stored so.
        packed: how values are unpacked that several share bytes; `dtype` is what comes out.
    """

    uri: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float | None = None
    packed: Packed | None = None


@dataclass(frozen=True)
class Packed:
    """How a tensor is unpacked.

    Attributes:
        bytes: that it takes.
        unpacked: these -> all its values, in its shape.
    """

    bytes: int
    unpacked: Callable[[bytearray], Tensor]


def stored_tensors(folder: str, *, shown: str | None = None) -> dict[str, StoredTensor]:
    """Name -> place of every tensor in a diffusers folder; reads the files' headers only.

    Args:
        folder: URI of a folder with one safetensors file, or several and their index.
        shown: what errors call the folder (default: its URI).

    Raises:
        ValueError: a file that is missing, cut short or isn't safetensors, a file outside the
            folder, or a tensor that two files hold.
    """
    place = folder if shown is None else shown
    index = storage.join(folder, f"{WEIGHTS_FILE}.index.json")
    names = [WEIGHTS_FILE]
    if storage.exists(index):
        names = shard_names(storage.read_bytes(index), f"{place}/{WEIGHTS_FILE}.index.json")
    found: dict[str, StoredTensor] = {}
    for name in names:
        uri = storage.join(folder, name)
        if not storage.exists(uri):
            raise ValueError(
                f"{place} has no {name}: the folder needs the model's weights as safetensors, whole"
            )
        for tensor, stored in tensors_of_file(uri).items():
            if tensor in found:
                raise ValueError(
                    f"{place}: {found[tensor].uri} and {uri} both hold {escaped(tensor)}: copy the "
                    "model's files from one checkpoint"
                )
            found[tensor] = stored
    return found


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a model whose fp8 weights have a scale each, which then belongs to the weight.

    ``<layer>.weight`` of float8 has the scale ``<layer>.weight_scale``, or ``<layer>.scale_weight``
    as older files call it.

    Raises:
        ValueError: an fp8 weight without a scale, a scale without its weight, or one that isn't
            one finite positive number.
    """
    found = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALES)}
    for name, tensor in stored.items():
        if not name.endswith(SCALES):
            continue
        layer = name[: -len(next(end for end in SCALES if name.endswith(end)))]
        weight = found.get(f"{layer}.weight")
        if weight is None or weight.dtype not in FP8 or weight.scale is not None:
            raise ValueError(f"{tensor.uri}: {escaped(name)} is the scale of no fp8 weight")
        value = read_tensor(tensor).float() if math.prod(tensor.shape) == 1 else torch.zeros(1)
        if not value.isfinite() or value <= 0:
            raise ValueError(
                f"{tensor.uri}: expected {escaped(name)} to be one positive number, got shape "
                f"{tensor.shape}: weights with a scale a row or block aren't read"
            )
        found[f"{layer}.weight"] = replace(weight, scale=value.item())
    bare = [name for name, tensor in found.items() if tensor.dtype in FP8 and not tensor.scale]
    if bare:
        raise ValueError(f"{found[bare[0]].uri}: the fp8 weight {escaped(bare[0])} has no scale")
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """A whole tensor on the CPU, in the file's dtype; one with a scale in float32."""
    dtype = stored.dtype if stored.scale is None else torch.float32
    values = torch.empty(stored.shape, dtype=dtype)
    system, path = storage.filesystem(stored.uri)
    buffer = bytearray(min(BUFFER_BYTES, max(1, values.numel()) * stored.dtype.itemsize))
    with system.open_input_file(path) as file:
        _read_values(file, stored, 0, values, buffer)
    return values


@contextmanager
def parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Models built inside get parameters of `dtype` without storage; their buffers are real.

    Unlike `torch.device("meta")`, it keeps what constructors compute: tables of positions and
    rotary frequencies, which are in no file. It holds for all of the process while it lasts.
    """
    usual = torch.get_default_dtype()
    replace: Any = _without_storage  # torch's annotation leaves out that a hook may return one
    hook = register_module_parameter_registration_hook(replace)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
        hook.remove()


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """A parameter that initialisers don't reach: they run after it is registered."""
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def missing(
    module: nn.Module, sources: Mapping[nn.Parameter, StoredTensor]
) -> dict[str, StoredTensor]:
    """The module's present name -> place of every parameter without storage.

    Call it once the module has all its parts, and before sharding, which replaces parameters and
    keeps names.

    Args:
        sources: by the parameter objects that the model was built with; adapters and wrappers may
            have renamed them since.

    Raises:
        ValueError: a parameter without storage whose place isn't known.
    """
    empty = {name: p for name, p in module.named_parameters() if p.is_meta}
    unknown = [name for name, parameter in empty.items() if parameter not in sources]
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters have neither storage nor a place in the model's files, "
            f"first {unknown[0]}: load the model whole"
        )
    return {name: sources[parameter] for name, parameter in empty.items()}


@torch.no_grad()
def fill(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device | str,
    part: Callable[[Tensor], Part] = part_of,
) -> None:
    """Reads the named parameters and buffers from their files, of sharded ones this rank's part.

    Values are converted to the parameter's dtype. Not a collective: ranks don't wait for each
    other.

    Args:
        module: plain, or sharded by a strategy; parameters that `stored` doesn't name stay as they
            are.
        stored: by the module's names.
        device: where the values of parameters without storage go; others stay where they are.
        part: what this rank holds of a parameter, as the strategy says that sharded it.

    Raises:
        ValueError: a name that the module lacks, another shape, or a parameter that is split along
            another dimension than the first.
        OSError: a file that ends early or can't be read.
    """
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    unknown = [name for name in stored if name not in targets]
    if unknown:
        raise ValueError(f"expected names of the module, got {len(unknown)} others: {unknown[0]}")
    buffer = bytearray(BUFFER_BYTES)
    values: dict[str, Tensor] = {}
    in_file_order = sorted(stored.items(), key=lambda item: (item[1].uri, item[1].offset))
    for uri, entries in groupby(in_file_order, key=lambda item: item[1].uri):
        system, path = storage.filesystem(uri)
        with system.open_input_file(path) as file:
            for name, source in entries:
                mine = part(targets[name])
                if tuple(mine.shape) != source.shape:
                    raise ValueError(
                        f"{name} is {tuple(mine.shape)} in the model and {source.shape} in {uri}"
                    )
                if mine.values.is_meta:
                    mine = replace(mine, values=torch.empty_like(mine.values, device=device))
                    values[name] = _like(targets[name], mine.values)
                _read_part(file, source, mine, buffer)
    module.load_state_dict(values, strict=False, assign=True)


def _like(target: Tensor, local: Tensor) -> Tensor:
    """The local values as a tensor that is sharded as the target is."""
    if not isinstance(target, DTensor):
        return local
    return DTensor.from_local(
        local,
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def _read_part(file: NativeFile, source: StoredTensor, part: Part, buffer: bytearray) -> None:
    """Fills a part with its stored values; what lies beyond the last one is padding."""
    count = min(part.values.numel(), math.prod(source.shape) - part.first)
    if count > 0:  # the last workers may hold padding alone
        _read_values(file, source, part.first, part.values.view(-1)[:count], buffer)


def _read_values(
    file: NativeFile, source: StoredTensor, first: int, out: Tensor, buffer: bytearray
) -> None:
    """Fills `out` with the stored values from number `first` on, a buffer at a time."""
    if source.packed is not None:
        content = bytearray(source.packed.bytes)
        file.seek(source.offset)
        _read_whole(file, memoryview(content), source.uri)
        whole = source.packed.unpacked(content).flatten()
        out.view(-1).copy_(whole[first : first + out.numel()])
        return
    values, size = out.view(-1), source.dtype.itemsize
    view, step = memoryview(buffer), len(buffer) // size
    for start in range(0, len(values), step):
        count = min(step, len(values) - start)
        file.seek(source.offset + (first + start) * size)
        _read_whole(file, view[: count * size], source.uri)
        read = torch.frombuffer(buffer, dtype=source.dtype, count=count)
        if source.scale is not None:
            read = read.float() * source.scale
        values[start : start + count].copy_(read)


def _read_whole(file: NativeFile, view: memoryview, uri: str) -> None:
    """Fills the view; a read may bring less than was asked for."""
    while len(view):
        got = file.readinto(view)
        if not got:
            raise OSError(f"{uri} ended early: it was changed while it was read; copy it again")
        view = view[got:]


def tensors_of_file(uri: str) -> dict[str, StoredTensor]:
    """Name -> place of every tensor in one safetensors file; only its header is read.

    Raises:
        ValueError, OSError: as `piflow.storage.tensor_file.read_header`.
    """
    return {
        name: StoredTensor(uri, tensor.start, tensor.shape, DTYPES[tensor.code])
        for name, tensor in read_header(uri).tensors.items()
    }
