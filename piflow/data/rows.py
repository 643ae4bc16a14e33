"""A row of the embedding store: its columns, and numbers as bytes on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from piflow.backbones.text import EncodedPrompt
from piflow.data.manifest import LatentDtype, LatentInputs, StoreInputs, TokenDtype
from piflow.data.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("scale", pa.float32(), nullable=False),
        pa.field("tokens", pa.large_binary(), nullable=False),
        pa.field("pooled", pa.binary(), nullable=True),
    ]
)

LATENT_COLUMNS = ("picture", "latent", "latent_shape")

SCHEMA_WITH_LATENTS = pa.schema(
    [
        *SCHEMA,
        pa.field("picture", pa.string(), nullable=True),
        pa.field("latent", pa.large_binary(), nullable=True),
        pa.field("latent_shape", pa.list_(pa.int32()), nullable=True),
    ]
)

_FP8_MAX = 448.0

_PIECE = 2**15  # numbers that are decoded at a time


@dataclass(frozen=True)
class EmbeddingBatch:
    """Decoded rows: tokens ``(m, L, D)`` float32, zeros beyond ``num_tokens`` ``(m,)`` int64.

    ``L`` is the encoder's ``max_tokens``; pooled is ``(m, P)`` float32, or None for encoders
    without one; sizes are pixels. Latents are a row's ``(C, h, w)`` float32 each; None if the store
    has none or they weren't read.
    """

    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor | None
    latents: tuple[Tensor, ...] | None = None


def encoded_table(
    prompts: Sequence[Prompt],
    encoded: Sequence[EncodedPrompt],
    dtype: TokenDtype,
    latents: LatentInputs | None = None,
) -> pa.Table:
    """Rows as they lie on disk, of `SCHEMA` or, with latents, `SCHEMA_WITH_LATENTS`.

    Raises:
        ValueError: as `write_shard`.
    """
    with_pooled = sum(item.pooled is not None for item in encoded)
    if with_pooled not in (0, len(encoded)):
        raise ValueError(
            f"{with_pooled} of {len(encoded)} embeddings have a pooled vector: give all of them "
            "one, or none"
        )
    schema = SCHEMA if latents is None else SCHEMA_WITH_LATENTS
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for prompt, (tokens, pooled, _, latent) in zip(prompts, encoded, strict=True):
        _require_finite(prompt, "encoder", tokens, pooled)
        content, scale = quantize(tokens, dtype)
        columns["prompt_id"].append(prompt.prompt_id)
        columns["prompt"].append(prompt.text)
        columns["height"].append(prompt.height)
        columns["width"].append(prompt.width)
        columns["num_tokens"].append(tokens.shape[0])
        columns["scale"].append(scale)
        columns["tokens"].append(content)
        columns["pooled"].append(
            None if pooled is None else pooled.float().contiguous().numpy().tobytes()
        )
        if latents is not None:
            if (latent is None) != (prompt.picture is None):
                raise ValueError(f"{prompt} needs latents if it has a picture, and only then")
            _require_finite(prompt, "VAE", latent)
            columns["picture"].append(None if prompt.picture is None else prompt.picture.key)
            columns["latent"].append(latent_bytes(latent, latents.dtype))
            columns["latent_shape"].append(None if latent is None else list(latent.shape))
    return pa.table(columns, schema=schema)


def _require_finite(prompt: Prompt, who: str, *tensors: Tensor | None) -> None:
    if not all(bool(x.isfinite().all()) for x in tensors if x is not None):
        raise ValueError(
            f"the {who} gave non-finite numbers for prompt {prompt.text!r} ({prompt.prompt_id}); "
            f"check the {who}'s weights"
        )


def quantize(tokens: Tensor, dtype: TokenDtype) -> tuple[bytes, float]:
    """Token states ``(n, D)`` float32 -> little-endian bytes and the row's scale."""
    import torch

    if dtype == "bf16":
        return tokens.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes(), 1.0
    largest = float(tokens.abs().max()) if tokens.numel() else 0.0
    # float32, as it is stored: the reader must multiply by the very number we divide by
    scale = float(np.float32(largest / _FP8_MAX))
    if scale == 0.0:
        scale = 1.0
    # the float32 scale may be rounded down: clamp, e4m3fn has no infinity to fall into
    scaled = (tokens.float() / scale).clamp(-_FP8_MAX, _FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).contiguous().view(torch.uint8).numpy().tobytes(), scale


def dequantize(
    content: NDArray[np.uint8], scale: float, dtype: TokenDtype, out: NDArray[np.float32]
) -> None:
    """The inverse of `quantize`.

    NumPy and a table of the 256 values, in pieces that stay in a core's cache: several times faster
    than torch's conversion, and no thread of OpenMP's competes with the training step's.

    Args:
        content: a row's bytes.
        scale: the row's scale.
        dtype: the stored number format.
        out: filled with the row's numbers, ``(n · D,)``, contiguous.
    """
    if dtype == "fp8":
        for start in range(0, len(out), _PIECE):
            part = slice(start, start + _PIECE)
            np.take(_fp8_values(), content[part], out=out[part], mode="clip")
            out[part] *= np.float32(scale)
    else:  # bfloat16 is float32's upper half
        np.left_shift(content.view("<u2"), 16, out=out.view("<u4"), dtype="<u4")
        out *= np.float32(scale)


@cache
def _fp8_values() -> NDArray[np.float32]:
    """What each byte is as e4m3, ``(256,)``."""
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float().numpy()


def _contents(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """All bytes of a column of bytes, one row after the other, without a copy of one chunk."""
    chunks = []
    for chunk in column.chunks:
        limits, data = _limits(chunk), chunk.buffers()[2]
        chunks.append(np.frombuffer(data, dtype=np.uint8)[limits[0] : limits[-1]])
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _limits(column: pa.Array) -> NDArray[Any]:
    """Where the rows of a column of bytes begin, and the last one ends, in its data, ``(n + 1,)``.

    As int32, or int64 if the column is large.
    """
    kind = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    offsets = np.frombuffer(column.buffers()[1], dtype=kind)
    return offsets[column.offset : column.offset + len(column) + 1]


def cut_rows(batches: list[pa.RecordBatch], owners: NDArray[Any], places: NDArray[Any]) -> pa.Table:
    """Rows of some batches, each given by its batch and its place in it.

    Bytes are copied once, straight into their place; `take` would copy them several times.
    """
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    numbers = starts[owners] + places
    columns = []
    for index, field in enumerate(batches[0].schema):
        parts = [batch.column(index) for batch in batches]
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            columns.append(_cut_bytes(parts, owners, numbers))
        else:
            columns.append(pa.concat_arrays(parts).take(pa.array(numbers)))
    return pa.Table.from_arrays(columns, schema=batches[0].schema)


def _cut_bytes(parts: list[pa.Array], owners: NDArray[Any], numbers: NDArray[Any]) -> pa.Array:
    """Rows of a column of bytes, numbered through its parts; `owners` are the parts they're in."""
    limits = [_limits(part) for part in parts]
    begins = np.concatenate([limit[:-1] for limit in limits])[numbers]
    ends = np.concatenate([limit[1:] for limit in limits])[numbers]
    data = [memoryview(part.buffers()[2] or b"") for part in parts]
    rows = zip(owners.tolist(), begins.tolist(), ends.tolist(), strict=True)
    content = b"".join([data[owner][begin:end] for owner, begin, end in rows])
    offsets = np.zeros(len(numbers) + 1, dtype=begins.dtype)
    np.cumsum(ends - begins, out=offsets[1:])
    valid = None
    if any(part.null_count for part in parts):
        present = np.concatenate([part.is_valid().to_numpy(zero_copy_only=False) for part in parts])
        valid = pa.array(present[numbers]).buffers()[1]  # a bool array's data are a bitmap
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(parts[0].type, len(numbers), buffers)


def latent_bytes(latent: Tensor | None, dtype: LatentDtype) -> bytes | None:
    """Latents in the store's little-endian format; None stays None."""
    import torch

    if latent is None:
        return None
    stored = latent.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return stored.contiguous().view(torch.uint8).numpy().tobytes()


def _decode_latents(table: pa.Table, inputs: StoreInputs) -> tuple[Tensor, ...] | None:
    import torch

    if inputs.latents is None or "latent" not in table.column_names:
        return None
    contents, shapes = table["latent"].to_pylist(), table["latent_shape"].to_pylist()
    if None in contents:  # an empty or negative prompt
        return None
    stored = torch.bfloat16 if inputs.latents.dtype == "bf16" else torch.float32
    return tuple(
        torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).view(stored).view(shape)
        .float()
        for content, shape in zip(contents, shapes, strict=True)
    )  # fmt: skip


def decode_rows(table: pa.Table, inputs: StoreInputs) -> EmbeddingBatch:
    """Rows as they lie on disk -> padded tensors."""
    import torch

    encoder = inputs.encoder
    counts = table["num_tokens"].to_pylist()
    tokens = np.zeros((table.num_rows, encoder.max_tokens, encoder.hidden_size), np.float32)
    contents, start = _contents(table["tokens"]), 0
    for row, count, scale in zip(tokens, counts, table["scale"].to_pylist(), strict=True):
        end = start + count * encoder.hidden_size * (1 if inputs.dtype == "fp8" else 2)
        dequantize(contents[start:end], scale, inputs.dtype, row[:count].reshape(-1))
        start = end
    pooled = None
    if table.num_rows and not table["pooled"].null_count:
        vectors = np.array(_contents(table["pooled"])).view("<f4")
        pooled = torch.from_numpy(vectors.reshape(table.num_rows, -1))
    return EmbeddingBatch(
        prompt_ids=tuple(table["prompt_id"].to_pylist()),
        prompts=tuple(table["prompt"].to_pylist()),
        heights=tuple(table["height"].to_pylist()),
        widths=tuple(table["width"].to_pylist()),
        tokens=torch.from_numpy(tokens),
        num_tokens=torch.tensor(counts, dtype=torch.int64),
        pooled=pooled,
        latents=_decode_latents(table, inputs),
    )
