"""GGUF files of a model's weights, by the `gguf` library: written tensor by tensor, and read.

Tensors have the model's own names, as diffusers reads them. Large files are read where they lie on
a disk; one on an object store is copied to this machine first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from piflow import storage
from piflow.config.model import GgufType
from piflow.sharding.weights import Packed, StoredTensor
from piflow.storage.foreign import ForeignDataError, shown
from piflow.storage.model_folder import LIBRARY_ERRORS, reason

GGUF_FILE = "diffusion_pytorch_model.gguf"
BLOCK = 32  # values of a row that share a scale, in all of `GgufType`
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_gguf(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, GgufType],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
    *,
    architecture: str,
) -> None:
    """A GGUF file on a local disk; memory holds one tensor.

    Args:
        packed: of the tensors that are packed, matrices whose rows are multiples of `BLOCK`; all
            others are float32.
        metadata: texts under keys of their own.
        read: name -> its value.

    Raises:
        ValueError: the library isn't installed, or values that aren't finite.
    """
    gguf = library()
    types = {name: gguf.GGMLQuantizationType[packed.get(name, "F32")] for name in sorted(shapes)}
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, text in sorted(metadata.items()):
        writer.add_string(key, text)
    for name, kind in types.items():
        size, per_block = gguf.GGML_QUANT_SIZES[kind]
        count = torch.Size(shapes[name]).numel()
        kept = torch.empty(0).numpy().dtype
        writer.add_tensor_info(name, shapes[name], kept, count // size * per_block, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name, kind in types.items():
            value = read(name).detach().float().contiguous()
            if not value.isfinite().all():
                raise ValueError(f"{name} isn't finite: check that training stayed finite")
            writer.write_tensor_data(gguf.quants.quantize(value.numpy(), kind))
    finally:
        writer.close()


def read_gguf(uri: str) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """The texts of a GGUF file, and where its tensors lie.

    Args:
        uri: of a file on a local disk.

    Raises:
        ValueError: the library isn't installed, it isn't GGUF, or holds types that aren't read.
    """
    gguf = library()
    try:
        reader = gguf.GGUFReader(storage.absolute(uri))
        texts = {
            name: bytes(field.parts[field.data[0]]).decode()
            for name, field in reader.fields.items()
            if field.types == [gguf.GGUFValueType.STRING]
        }
        return texts, {tensor.name: _stored(uri, tensor) for tensor in reader.tensors}
    except ForeignDataError:
        raise
    except LIBRARY_ERRORS as error:
        raise ForeignDataError(f"{uri} is damaged or isn't GGUF: {reason(error)}") from error


def _stored(uri: str, tensor: Any) -> StoredTensor:
    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
    if kind in _PLAIN:
        return StoredTensor(uri, int(tensor.data_offset), shape, _PLAIN[kind])
    if kind not in get_args(GgufType):
        raise ForeignDataError(
            f"{uri}: {shown(tensor.name)} is {kind}; expected {', '.join(get_args(GgufType))} or "
            f"{', '.join(_PLAIN)}"
        )

    def unpacked(content: bytearray) -> Tensor:
        import numpy as np

        rows = np.frombuffer(content, dtype=np.uint8).reshape(shape[0], -1)
        return torch.from_numpy(library().quants.dequantize(rows, tensor_type))

    tensor_type = tensor.tensor_type
    packed = Packed(int(tensor.n_bytes), unpacked)
    return StoredTensor(uri, int(tensor.data_offset), shape, torch.float32, packed=packed)


def library() -> Any:
    """The module `gguf`.

    Raises:
        ValueError: it isn't installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError(
            "GGUF needs the package gguf: pip install 'piflow[gguf]', or choose another --format"
        ) from error
    return gguf
