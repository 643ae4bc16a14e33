"""A row of the embedding store: its columns, and numbers as bytes on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from piflow.data.manifest import LatentDtype, LatentInputs, StoreInputs, TokenDtype
from piflow.data.prompts import Prompt
from piflow.storage.fingerprint import EncoderIdentity

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from piflow.backbones.text import EncodedPrompt


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

SCHEMA_WITH_LATENTS = pa.schema(
    [
        *SCHEMA,
        pa.field("picture", pa.string(), nullable=True),
        pa.field("latent", pa.large_binary(), nullable=True),
        pa.field("latent_shape", pa.list_(pa.int32()), nullable=True),
    ]
)

CONDITION_COLUMNS = (
    pa.field("condition", pa.string(), nullable=True),
    pa.field("condition_latent", pa.large_binary(), nullable=True),
    pa.field("condition_shape", pa.list_(pa.int32()), nullable=True),
)

NEGATIVE_COLUMNS = (
    pa.field("shared_tokens", pa.int32(), nullable=False),
    pa.field("negative_tokens", pa.int32(), nullable=False),
)
"""Of a row whose prompt was read with its picture, and the negative prompt as well.

Attention is causal and the picture stands before the prompt, so the negative prompt's states begin
as the prompt's: `shared_tokens` are the same. Its other ones, `negative_tokens`, are the last of
the row's `tokens`, counted in `num_tokens`.
"""

_FP8_MAX = 448.0

_PIECE = 2**15  # numbers that are decoded at a time


class TokenStates(NamedTuple):
    """Token states ``(m, L, D)`` float32, zeros beyond ``num_tokens`` ``(m,)`` int64."""

    tokens: Tensor
    num_tokens: Tensor

    def select(self, rows: Sequence[int] | slice) -> TokenStates:
        """These rows, in this order."""
        return TokenStates(self.tokens[rows], self.num_tokens[rows])


@dataclass(frozen=True)
class EmbeddingBatch:
    """Decoded rows: tokens ``(m, L, D)`` float32, zeros beyond ``num_tokens`` ``(m,)`` int64.

    ``L`` is the encoder's ``max_tokens``; pooled is ``(m, P)`` float32, or None for encoders
    without one; sizes are pixels. Latents are a row's ``(C, h, w)`` float32 each; None if the store
    has none or they weren't read. Likewise conditions, the latents of pictures to be edited.
    ``negative`` are the negative prompts of rows that have their own.
    """

    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    tokens: Tensor
    num_tokens: Tensor
    pooled: Tensor | None
    latents: tuple[Tensor, ...] | None = None
    conditions: tuple[Tensor, ...] | None = None
    negative: TokenStates | None = None

    def select(self, rows: Sequence[int]) -> EmbeddingBatch:
        """These rows, in this order."""
        chosen = list(rows)
        latents, conditions = (
            None if values is None else tuple(values[row] for row in chosen)
            for values in (self.latents, self.conditions)
        )
        return EmbeddingBatch(
            prompt_ids=tuple(self.prompt_ids[row] for row in chosen),
            prompts=tuple(self.prompts[row] for row in chosen),
            heights=tuple(self.heights[row] for row in chosen),
            widths=tuple(self.widths[row] for row in chosen),
            tokens=self.tokens[chosen],
            num_tokens=self.num_tokens[chosen],
            pooled=None if self.pooled is None else self.pooled[chosen],
            latents=latents,
            conditions=conditions,
            negative=None if self.negative is None else self.negative.select(chosen),
        )


def schema_of(
    latents: LatentInputs | None, conditions: LatentInputs | None, negatives: bool = False
) -> pa.Schema:
    """The columns of a store with or without pictures' latents and pictures to be edited.

    Args:
        negatives: whether its rows have negative prompts of their own.
    """
    schema = SCHEMA if latents is None else SCHEMA_WITH_LATENTS
    if conditions is not None:
        schema = pa.schema([*schema, *CONDITION_COLUMNS])
    return pa.schema([*schema, *NEGATIVE_COLUMNS]) if negatives else schema


def encoded_table(
    prompts: Sequence[Prompt],
    encoded: Sequence[EncodedPrompt],
    dtype: TokenDtype,
    latents: LatentInputs | None = None,
    conditions: LatentInputs | None = None,
    negatives: bool = False,
) -> pa.Table:
    """Rows as they lie on disk, with the columns of `schema_of`.

    Raises:
        ValueError: as `write_shard`.
    """
    with_pooled = sum(item.pooled is not None for item in encoded)
    if with_pooled not in (0, len(encoded)):
        raise ValueError(
            f"{with_pooled} of {len(encoded)} embeddings have a pooled vector: give all of them "
            "one, or none"
        )
    schema = schema_of(latents, conditions, negatives)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for prompt, item in zip(prompts, encoded, strict=True):
        pooled, latent, condition = item.pooled, item.latent, item.condition
        tokens = _all_tokens(prompt, item)
        _require_finite(prompt, "encoder", tokens, pooled)
        if negatives:
            columns["shared_tokens"].append(item.shared)
            columns["negative_tokens"].append(tokens.shape[0] - item.tokens.shape[0])
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
        for names, picture, values, how in (
            (("picture", "latent", "latent_shape"), prompt.picture, latent, latents),
            (
                ("condition", "condition_latent", "condition_shape"),
                prompt.condition,
                condition,
                conditions,
            ),
        ):
            if how is None:
                continue
            if (values is None) != (picture is None):
                raise ValueError(f"{prompt} needs latents if it has a picture, and only then")
            _require_finite(prompt, "VAE", values)
            columns[names[0]].append(None if picture is None else picture.key)
            columns[names[1]].append(latent_bytes(values, how.dtype))
            columns[names[2]].append(None if values is None else list(values.shape))
    return pa.table(columns, schema=schema)


def _all_tokens(prompt: Prompt, item: EncodedPrompt) -> Tensor:
    """A row's token states: the prompt's, and those that its negative prompt has alone."""
    import torch

    if item.negative is None:
        return item.tokens
    if not 0 < item.shared <= item.tokens.shape[0]:
        raise ValueError(
            f"{prompt} shares {item.shared} tokens with its negative prompt, of "
            f"{item.tokens.shape[0]}; expected those of its picture"
        )
    return torch.cat([item.tokens, item.negative])


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
    """What each byte is as e4m3, ``(256,)``: 1 bit of sign, 4 of exponent, 3 of mantissa.

    Without torch, whose import takes longer than a reading process's other work at its start.
    """
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    numbers = np.ldexp(np.where(exponent == 0, 0, 8) + mantissa, np.maximum(exponent, 1) - 10)
    numbers[codes & 127 == 127] = np.nan
    return np.where(codes < 128, numbers, -numbers).astype(np.float32)


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


def decode_rows(table: pa.Table, inputs: StoreInputs) -> EmbeddingBatch:
    """Rows as they lie on disk -> padded tensors."""
    return as_tensors(decoded(table, inputs), inputs)


def decoded(table: pa.Table, inputs: StoreInputs) -> pa.Table:
    """Rows as they lie on disk -> the same rows with lists of float32 numbers in place of bytes.

    Of tokens, still without padding, of pooled vectors and of latents; other columns stay as they
    are. Without torch, so that a reading process starts fast.
    """
    numbers = {"tokens": _dequantized(table, inputs)}
    if table.num_rows and not table["pooled"].null_count:
        numbers["pooled"] = _floats(table["pooled"], "fp32")
    for name, how in (("latent", inputs.latents), ("condition_latent", inputs.conditions)):
        if how and name in table.column_names and not table[name].null_count:
            numbers[name] = _floats(table[name], how.dtype)
    for name, values in numbers.items():
        lists = _lists(table[name], values)
        table = table.set_column(table.column_names.index(name), name, lists)
    return table


def _dequantized(table: pa.Table, inputs: StoreInputs) -> NDArray[np.float32]:
    """All token states of all rows."""
    sizes = [count * inputs.encoder.hidden_size for count in table["num_tokens"].to_pylist()]
    numbers, contents = np.empty(sum(sizes), np.float32), _contents(table["tokens"])
    width, start = 1 if inputs.dtype == "fp8" else 2, 0
    for size, scale in zip(sizes, table["scale"].to_pylist(), strict=True):
        end = start + size
        content = contents[start * width : end * width]
        dequantize(content, scale, inputs.dtype, numbers[start:end])
        start = end
    return numbers


def _floats(column: pa.ChunkedArray, dtype: LatentDtype) -> NDArray[np.float32]:
    """All numbers of a column of bytes, one row after the other."""
    contents = _contents(column).copy()  # aligned
    if dtype == "fp32":
        return contents.view("<f4")
    numbers = np.empty(len(contents) // 2, np.float32)
    dequantize(contents, 1.0, "bf16", numbers)
    return numbers


def _lists(column: pa.ChunkedArray, numbers: NDArray[np.float32]) -> pa.Array:
    """A column of bytes as lists of its numbers."""
    sizes = pc.binary_length(column).to_numpy().astype(np.int64)
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes * len(numbers) // max(sizes.sum(), 1), out=offsets[1:])
    return pa.LargeListArray.from_arrays(offsets, numbers)


def as_tensors(table: pa.Table, inputs: StoreInputs) -> EmbeddingBatch:
    """Decoded rows as tensors.

    They share the table's memory where no padding is needed, so nobody may write to them.
    """
    import torch

    counts = table["num_tokens"].to_pylist()
    tokens = _tensor(_padded(_numbers(table["tokens"]), counts, inputs.encoder))
    own = TokenStates(tokens, torch.tensor(counts, dtype=torch.int64))
    negative = None
    if "negative_tokens" in table.column_names and any(table["negative_tokens"].to_pylist()):
        own, negative = _parted(own, table)
    pooled = None
    if table.num_rows and pa.types.is_large_list(table["pooled"].type):
        pooled = _tensor(_numbers(table["pooled"])).view(table.num_rows, -1)
    return EmbeddingBatch(
        prompt_ids=tuple(table["prompt_id"].to_pylist()),
        prompts=tuple(table["prompt"].to_pylist()),
        heights=tuple(table["height"].to_pylist()),
        widths=tuple(table["width"].to_pylist()),
        tokens=own.tokens,
        num_tokens=own.num_tokens,
        pooled=pooled,
        latents=_latents(table, "latent", "latent_shape"),
        conditions=_latents(table, "condition_latent", "condition_shape"),
        negative=negative,
    )


def _parted(both: TokenStates, table: pa.Table) -> tuple[TokenStates, TokenStates]:
    """Prompts and negative prompts of rows that hold both, see `NEGATIVE_COLUMNS`."""
    import torch

    own, negative = both.tokens.clone(), torch.zeros_like(both.tokens)
    shared = table["shared_tokens"].to_pylist()
    alone = table["negative_tokens"].to_pylist()
    ends = both.num_tokens.tolist()
    for row, (common, last, end) in enumerate(zip(shared, alone, ends, strict=True)):
        negative[row, :common] = own[row, :common]
        negative[row, common : common + last] = own[row, end - last : end]
        own[row, end - last : end] = 0
    lengths = torch.tensor([common + last for common, last in zip(shared, alone, strict=True)])
    return (
        TokenStates(own, both.num_tokens - torch.tensor(alone)),
        TokenStates(negative, lengths),
    )


def _padded(
    numbers: NDArray[np.float32], counts: list[int], encoder: EncoderIdentity
) -> NDArray[np.float32]:
    """Tokens ``(m, L, D)``, zeros beyond each row's count."""
    rows = numbers.reshape(-1, encoder.hidden_size)
    shape = len(counts), encoder.max_tokens, encoder.hidden_size
    if all(count == encoder.max_tokens for count in counts):
        return rows.reshape(shape)
    tokens, end = np.zeros(shape, np.float32), 0
    for row, count in zip(tokens, counts, strict=True):
        row[:count] = rows[end : end + count]
        end += count
    return tokens


def _latents(table: pa.Table, column: str, shape_column: str) -> tuple[Tensor, ...] | None:
    """Each row's latents; None without them, and for an empty or a negative prompt."""
    if column not in table.column_names or table[column].null_count:
        return None
    shapes = table[shape_column].to_pylist()
    numbers = _tensor(_numbers(table[column])).split([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(numbers, shapes, strict=True))


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """All numbers of a column of lists, without a copy of one chunk."""
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _tensor(numbers: NDArray[np.float32]) -> Tensor:
    """A tensor in the array's memory."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(numbers)
