"""The embedding store: Parquet shards and one manifest.

::

    store/
      manifest.json                  written last: a store without it is unfinished
      shard-00000.parquet …          rows in file order of the prompts, grouped by bucket
      empty-prompt.parquet           the embedding of "", for guidance and prompt dropout
      negative-prompt-<id>.parquet   one for each negative prompt that a recipe asked for

A row holds one prompt's valid token states only, without padding. As ``fp8`` they are e4m3 with
one float32 ``scale`` for the row, ``x = scale · q`` with ``scale = max|x| / 448``: an element is
off by at most ``max(|x| / 16, scale / 1024)``. As ``bf16`` they are rounded to 8 bits of mantissa
and ``scale`` is 1. The pooled vector stays float32, it is small; it is null for encoders that have
none. Where the prompts have pictures, a row also holds its picture's latents, as the recipe's codec
gives them, in ``bf16`` (rounded) or ``fp32`` (exact), and their shape. A row group never mixes
buckets (picture sizes), so that the manifest alone decides the order of training. Pages carry
checksums.

Format 2 has no latents, and is what stores without pictures are still written in; format 3 has.

Negative prompts are additions: `piflow embed` encodes a recipe's own into a finished store, and
neither the store's inputs nor its `manifest_hash` know of them, because the recipe names the text
and the encoder decides its embedding.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, islice, pairwise
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from piflow import storage
from piflow.data.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SCHEMA_VERSION = 2
SCHEMA_VERSION_WITH_LATENTS = 3
MANIFEST = "manifest.json"
EMPTY_PROMPT = "empty-prompt.parquet"
TokenDtype = Literal["fp8", "bf16"]
DamagedRows = Literal["stop", "replace"]
LatentDtype = Literal["bf16", "fp32"]

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
_COMPRESSION = {name: "zstd" for name in SCHEMA.names} | {"tokens": "none", "pooled": "none"}
_LATENT_COMPRESSION = {"picture": "zstd", "latent": "none", "latent_shape.list.element": "zstd"}
_METADATA_KEY = b"piflow"
_FP8_MAX = 448.0
_PADDED_TOKENS = 512  # what FLUX.1's and Qwen-Image's pipelines pad to at most
_READS = 4  # row groups that are read side by side
_PIECE = 2**15  # numbers that are decoded at a time
_REMEDY = "delete it and run `piflow embed` again: only what is missing is made anew"


class StoreError(ValueError):
    """A store that can't be used; the message names the file and what to do."""


class DamageError(StoreError):
    """A file that is gone, or bytes that can't be decoded, while the storage itself answers."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderIdentity(_Record):
    """What decides an embedding, wherever the encoder's files lie.

    `name` holds architecture, sizes and what else changes the states; the hash covers weights,
    configurations and tokenizers.
    """

    name: str
    weights_sha256: str
    max_tokens: int
    hidden_size: int

    def __str__(self) -> str:
        return (
            f"{self.name} (weights {self.weights_sha256[:12]}, max_tokens {self.max_tokens}, "
            f"hidden_size {self.hidden_size})"
        )


class CodecIdentity(_Record):
    """What decides a picture's latents, wherever the VAE's files lie."""

    name: str
    weights_sha256: str

    def __str__(self) -> str:
        return f"{self.name} (weights {self.weights_sha256[:12]})"


class LatentInputs(_Record):
    """How pictures become latents."""

    codec: CodecIdentity
    dtype: LatentDtype


class SkippedPicture(_Record):
    """A prompt that was left out because of its picture."""

    prompt_id: str
    picture: str
    reason: str


class Bucket(_Record):
    """One picture size in pixels, its prompts, and the shape of its pictures' latents."""

    height: int
    width: int
    rows: int
    latent_shape: tuple[int, int, int] | None = None


class RowGroup(_Record):
    """The unit of reading; `bucket` is an index into the manifest's buckets."""

    rows: int
    bucket: int


class ShardEntry(_Record):
    """One Parquet file of the store."""

    path: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[RowGroup, ...]


class StoreInputs(_Record):
    """Everything that the store's content follows from."""

    schema_version: int
    encoder: EncoderIdentity
    dtype: TokenDtype
    rows_per_shard: int
    rows_per_group: int
    num_prompts: int
    prompts_sha256: str
    latents: LatentInputs | None = None

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON."""
        return _canonical_sha256(self)


class StoreManifest(_Record):
    """``manifest.json``."""

    inputs: StoreInputs
    inputs_sha256: str
    buckets: tuple[Bucket, ...]
    shards: tuple[ShardEntry, ...]
    empty_prompt: ShardEntry
    truncated_prompts: int
    negative_prompts: tuple[ShardEntry, ...] = ()
    skipped_pictures: tuple[SkippedPicture, ...] = ()

    @property
    def encoder(self) -> EncoderIdentity:
        """The text encoder that made the store."""
        return self.inputs.encoder

    @property
    def num_rows(self) -> int:
        """Prompts in the store, the empty and the negative ones not counted."""
        return sum(shard.rows for shard in self.shards)

    @property
    def files(self) -> tuple[ShardEntry, ...]:
        """All Parquet files."""
        return (*self.shards, *self.singles)

    @property
    def singles(self) -> tuple[ShardEntry, ...]:
        """The files of one prompt each, the empty one's and the negative ones'."""
        return (self.empty_prompt, *self.negative_prompts)

    @property
    def latent_bytes(self) -> int:
        """What all latents take."""
        if self.inputs.latents is None:
            return 0
        size = 2 if self.inputs.latents.dtype == "bf16" else 4
        return size * sum(b.rows * math.prod(b.latent_shape or (0,)) for b in self.buckets)

    @property
    def times_smaller(self) -> float:
        """What padding to 512 tokens would take in fp8 over what the files take without latents."""
        padded = self.num_rows * _PADDED_TOKENS * self.encoder.hidden_size
        return padded / (sum(shard.bytes for shard in self.shards) - self.latent_bytes)

    @property
    def manifest_hash(self) -> str:
        """Hex sha256 of the canonical JSON: names the content, less the negative prompts."""
        return _canonical_sha256(self, exclude={"negative_prompts"})

    def to_json(self) -> str:
        """Indented JSON, ends with a line end."""
        return self.model_dump_json(indent=1) + "\n"


def _canonical_sha256(record: _Record, exclude: set[str] | None = None) -> str:
    # without defaults: what a record without pictures is called doesn't change with newer fields
    tree = record.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class EncodedPrompt(NamedTuple):
    """One encoded prompt: tokens ``(n, D)``, pooled ``(P,)`` or None, float32 on the CPU.

    Its picture's latents are ``(C, h, w)`` on the CPU, in float32 or as they will be stored.
    """

    tokens: Tensor
    pooled: Tensor | None
    truncated: bool
    latent: Tensor | None = None


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


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one file: prompts, and rows of each row group in order."""

    path: str
    prompts: tuple[Prompt, ...]
    row_groups: tuple[RowGroup, ...]

    def prompts_by_group(self) -> list[tuple[Prompt, ...]]:
        """The prompts of each row group."""
        ends = list(accumulate(group.rows for group in self.row_groups))
        return [self.prompts[start:end] for start, end in pairwise([0, *ends])]

    def without(self, rows: AbstractSet[int]) -> ShardPlan:
        """The same file less these rows; row groups shrink, and those left empty are gone."""
        prompts = [prompt for row, prompt in enumerate(self.prompts) if row not in rows]
        groups, start = [], 0
        for group in self.row_groups:
            end = start + group.rows
            left = group.rows - sum(start <= row < end for row in rows)
            if left:
                groups.append(group.model_copy(update={"rows": left}))
            start = end
        return ShardPlan(self.path, tuple(prompts), tuple(groups))


def plan_store(
    prompts: Sequence[Prompt], rows_per_shard: int, rows_per_group: int
) -> tuple[tuple[Bucket, ...], list[ShardPlan]]:
    """Lay prompts out in shards and row groups.

    Buckets come in order of first appearance, prompts within a bucket in their given order; a row
    group ends where its bucket or its shard ends.
    """
    by_size: dict[tuple[int, int], list[Prompt]] = {}
    for prompt in prompts:
        by_size.setdefault((prompt.height, prompt.width), []).append(prompt)
    buckets = tuple(
        Bucket(height=height, width=width, rows=len(members))
        for (height, width), members in by_size.items()
    )
    rows = [(b, prompt) for b, members in enumerate(by_size.values()) for prompt in members]
    shards = []
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        part = rows[start : start + rows_per_shard]
        groups = _row_groups([bucket for bucket, _ in part], rows_per_group)
        path = f"shard-{number:05d}.parquet"
        shards.append(ShardPlan(path, tuple(prompt for _, prompt in part), groups))
    return buckets, shards


def _row_groups(buckets: list[int], rows_per_group: int) -> tuple[RowGroup, ...]:
    groups: list[RowGroup] = []
    start = 0
    for end in range(1, len(buckets) + 1):
        full = end - start == rows_per_group
        if end == len(buckets) or full or buckets[end] != buckets[start]:
            groups.append(RowGroup(rows=end - start, bucket=buckets[start]))
            start = end
    return tuple(groups)


def empty_prompt_plan() -> ShardPlan:
    """The file of the empty prompt; it stands for every picture size, so its own is 0 x 0."""
    return ShardPlan(EMPTY_PROMPT, (Prompt("", 0, 0),), (RowGroup(rows=1, bucket=0),))


def negative_prompt_plan(text: str) -> ShardPlan:
    """The file of a negative prompt, named by its text; for every picture size, so 0 x 0."""
    prompt = Prompt(text, 0, 0)
    path = f"negative-prompt-{prompt.prompt_id}.parquet"
    return ShardPlan(path, (prompt,), (RowGroup(rows=1, bucket=0),))


@dataclass(frozen=True)
class ShardReport:
    """What wasn't as it should be in a shard's inputs.

    ``truncated`` prompts were longer than the encoder takes, ``examples`` are a few of them.
    """

    truncated: int
    examples: tuple[str, ...]
    skipped: tuple[SkippedPicture, ...] = ()

    def to_json(self) -> str:
        """Canonical JSON."""
        skipped = [picture.model_dump(mode="json") for picture in self.skipped]
        tree = {"truncated": self.truncated, "truncated_examples": self.examples}
        return json.dumps(tree | ({"skipped": skipped} if skipped else {}), sort_keys=True)

    @staticmethod
    def of_json(content: str | bytes) -> ShardReport:
        """The inverse of `to_json`."""
        tree = json.loads(content)
        skipped = tuple(SkippedPicture(**picture) for picture in tree.get("skipped", ()))
        return ShardReport(tree["truncated"], tuple(tree["truncated_examples"]), skipped)


def write_shard(
    store_uri: str,
    plan: ShardPlan,
    encoded: Sequence[EncodedPrompt],
    inputs: StoreInputs,
    skipped: Sequence[SkippedPicture] = (),
) -> tuple[ShardEntry, ShardReport]:
    """Write one shard, whole or not at all. The file is built in memory first.

    Args:
        store_uri: the store.
        plan: what goes into the file, without the skipped prompts.
        encoded: an embedding for each prompt, with latents if the prompt has a picture.
        inputs: the store's.
        skipped: prompts that were left out, for the record.

    Raises:
        ValueError: an embedding or a latent isn't finite (names the prompt), the counts differ, or
            only some embeddings have a pooled vector.
        OSError: the storage refused.
    """
    if len(encoded) != len(plan.prompts):
        raise ValueError(f"{plan.path} expects {len(plan.prompts)} embeddings, got {len(encoded)}")
    cut = [p.text for p, e in zip(plan.prompts, encoded, strict=True) if e.truncated]
    report = ShardReport(len(cut), tuple(cut[:3]), tuple(skipped))
    facts = {"inputs_sha256": inputs.digest} | json.loads(report.to_json())
    table = encoded_table(
        plan.prompts, encoded, inputs.dtype, inputs.latents
    ).replace_schema_metadata({_METADATA_KEY: json.dumps(facts, sort_keys=True).encode()})
    compression = _COMPRESSION | ({} if inputs.latents is None else _LATENT_COMPRESSION)
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        table.schema,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        start = 0
        for group in plan.row_groups:
            writer.write_table(table.slice(start, group.rows), row_group_size=group.rows)
            start += group.rows
    content = memoryview(sink.getvalue())
    storage.write_bytes(storage.join(store_uri, plan.path), content)
    return _entry(plan, len(content), hashlib.sha256(content).hexdigest()), report


def reusable_shard(
    store_uri: str, plan: ShardPlan, inputs: StoreInputs
) -> tuple[ShardEntry, ShardReport] | None:
    """The entry of a shard that an earlier, interrupted job left behind; None if it must be made.

    The file is read whole, so that page checksums are compared.
    """
    uri = storage.join(store_uri, plan.path)
    system, path = storage.filesystem(uri)
    try:
        with _open_parquet(uri) as file:
            facts = (file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"{}")
            if json.loads(facts).get("inputs_sha256") != inputs.digest:
                return None
            ids = [i for g in range(file.num_row_groups) for i in _read_ids(file, g)]
    except (pa.ArrowException, OSError, ValueError):
        return None
    report = ShardReport.of_json(facts)
    skipped = {picture.prompt_id for picture in report.skipped}
    numbers = {row for row, prompt in enumerate(plan.prompts) if prompt.prompt_id in skipped}
    plan = plan.without(numbers)
    if ids != [prompt.prompt_id for prompt in plan.prompts]:
        return None
    size = int(system.get_file_info(path).size)
    return _entry(plan, size, storage.sha256(uri)), report


def write_manifest(store_uri: str, manifest: StoreManifest) -> None:
    """Write ``manifest.json``; from then on the store is complete."""
    storage.write_bytes(storage.join(store_uri, MANIFEST), manifest.to_json().encode())


def _read_ids(file: pq.ParquetFile, group: int) -> list[str]:
    return file.read_row_group(group)["prompt_id"].to_pylist()


def _entry(plan: ShardPlan, size: int, sha256: str) -> ShardEntry:
    return ShardEntry(
        path=plan.path,
        rows=len(plan.prompts),
        bytes=size,
        sha256=sha256,
        row_groups=plan.row_groups,
    )


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


# ----------------------------------------------------------------------------------- number format


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


def _cut(batches: list[pa.RecordBatch], owners: NDArray[Any], places: NDArray[Any]) -> pa.Table:
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


# ---------------------------------------------------------------------------------------- reading


class EmbeddingStore:
    """A complete store. Rows are numbered through all shards, in the manifest's order.

    Args:
        damaged_rows: `replace` leaves the rows of damaged row groups out of `index` and
            `first_by_hash`; `stop` raises when they come to one.
    """

    def __init__(
        self, uri: str, manifest: StoreManifest, damaged_rows: DamagedRows = "stop"
    ) -> None:
        self.uri = uri
        self.manifest = manifest
        self.damaged_rows = damaged_rows

    @staticmethod
    def open(uri: str, damaged_rows: DamagedRows = "stop") -> EmbeddingStore:
        """Open a store: reads its manifest and compares every file's presence and size.

        With `replace` the prompts' files aren't looked at: any of them may be damaged.

        Raises:
            StoreError: no or an unreadable manifest, a missing file or one of another size.
        """
        store = EmbeddingStore(uri, read_manifest(uri), damaged_rows)
        sizes = storage.file_sizes(uri)
        needed = store.manifest.files if damaged_rows == "stop" else store.manifest.singles
        for entry in needed:
            if entry.path not in sizes:
                raise StoreError(
                    f"embedding store {uri} lacks {entry.path}; run `piflow embed` again: only "
                    "what is missing is made anew"
                )
            if sizes[entry.path] != entry.bytes:
                raise StoreError(
                    f"{entry.path} of embedding store {uri} has {sizes[entry.path]} bytes, the "
                    f"manifest says {entry.bytes}; {_REMEDY}"
                )
        return store

    @property
    def manifest_hash(self) -> str:
        """Hex sha256 that names the store's exact content."""
        return self.manifest.manifest_hash

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            StoreError: names the first file whose content differs, and its damaged row groups.
        """
        for entry in self.manifest.files:
            found = storage.sha256(storage.join(self.uri, entry.path))
            if found != entry.sha256:
                raise StoreError(
                    f"{entry.path} of embedding store {self.uri} is corrupt ({self._damage(entry)})"
                    f": sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…; {_REMEDY}"
                )

    def _damage(self, entry: ShardEntry) -> str:
        """Which row groups of a file can't be read."""
        try:
            file = _open_shard(self.uri, entry.path)
        except StoreError:
            return "it can't be opened"
        damaged = []
        for group in range(file.num_row_groups):
            try:
                _read_row_group(self.uri, entry.path, group, file, None)
            except StoreError:
                damaged.append(str(group))
        if damaged:
            return f"row group{'s' if len(damaged) > 1 else ''} {', '.join(damaged)}"
        return "outside the pages of its row groups, or replaced as a whole"

    def require_encoder(self, expected: EncoderIdentity) -> None:
        """Check that the store was made by the given encoder.

        Raises:
            StoreError: names both.
        """
        if self.manifest.encoder != expected:
            raise StoreError(_other_encoder(self.uri, self.manifest.encoder, expected))

    def require_latents(self, codec: CodecIdentity | None = None) -> None:
        """Check that the store has pictures' latents, and of this codec if one is given.

        Raises:
            StoreError: says how to make such a store.
        """
        found = self.manifest.inputs.latents
        if found is None:
            raise StoreError(
                f"embedding store {self.uri} has no pictures' latents, which objective.pictures = "
                "store trains on; set embed.image_column and another embed.store, and run "
                "`piflow embed`"
            )
        if codec is not None and found.codec != codec:
            raise StoreError(
                f"the latents of embedding store {self.uri} were made by {found.codec}, the "
                f"recipe's model has {codec}; choose another embed.store, or set model.vae to the "
                "store's"
            )

    def index(self) -> pa.Table:
        """``row``, ``prompt_id``, ``prompt``, ``height``, ``width`` of all rows.

        And ``picture``, what the prompts file calls it, where there are latents.
        """
        columns = ["prompt_id", "prompt", "height", "width"]
        if self.manifest.inputs.latents is not None:
            columns.append("picture")
        reader = RowReader(self, columns=columns)
        tables = []
        for group, rows in enumerate(reader.group_rows):
            if self.damaged_rows == "stop" or reader.is_readable(group):
                tables.append(reader.rows(rows).append_column("row", pa.array(rows)))
        return pa.concat_tables(tables)

    def read(self, rows: Sequence[int]) -> EmbeddingBatch:
        """Decode the rows with these numbers, in this order."""
        table = RowReader(self).rows(np.asarray(rows, dtype=np.int64))
        return decode_rows(table, self.manifest.inputs)

    def first_by_hash(self, count: int) -> EmbeddingBatch:
        """The ``count`` rows with the smallest prompt ids: a fixed random choice of prompts.

        Raises:
            ValueError: the store has fewer rows that can be read.
        """
        index = self.index()
        order = np.argsort(np.array(index["prompt_id"].to_pylist()), kind="stable")
        rows = index["row"].to_numpy()[order]
        if self.damaged_rows == "replace":
            reader = RowReader(self)
            readable = (row for row in rows if reader.is_readable(int(reader.group_of(row))))
            rows = np.array(list(islice(readable, count)), dtype=np.int64)
        if count > len(rows):
            raise ValueError(
                f"{count} prompts were asked of embedding store {self.uri}, which holds "
                f"{len(rows)}; ask for fewer (evaluation.prompts)"
            )
        return self.read(rows[:count].tolist())

    def empty_prompt(self) -> EmbeddingBatch:
        """The embedding of "", one row; its size is 0 x 0."""
        return self._read_single(self.manifest.empty_prompt)

    def negative_prompt(self, text: str) -> EmbeddingBatch:
        """The embedding of a recipe's `guidance.negative_prompt`, one row; "" is the empty prompt.

        Raises:
            StoreError: the store doesn't hold it.
        """
        self.require_negative_prompt(text)
        return self._read_single(self._negative(text) or self.manifest.empty_prompt)

    def require_negative_prompt(self, text: str) -> None:
        """Check that the store holds this negative prompt.

        Raises:
            StoreError: it doesn't; says how to add it.
        """
        if text and self._negative(text) is None:
            raise StoreError(
                f"embedding store {self.uri} lacks the recipe's guidance.negative_prompt "
                f"{text!r}; run `piflow embed` with this recipe: only that prompt is encoded"
            )

    def _negative(self, text: str) -> ShardEntry | None:
        path = negative_prompt_plan(text).path
        return next((e for e in self.manifest.negative_prompts if e.path == path), None)

    def _read_single(self, entry: ShardEntry) -> EmbeddingBatch:
        table = _read_row_group(self.uri, entry.path, 0, None, None)
        return decode_rows(table, self.manifest.inputs)


class RowReader:
    """Reads rows by number; keeps the row groups used last, and no file open.

    Holds no torch and no Ray object, so it starts fast in a reading process.

    Args:
        columns: to read; default: all.
        kept_groups: row groups of each bucket that stay in memory: more than are in use at a time,
            and few enough that freed memory is used again, since fresh memory costs as much time
            as reading does.
    """

    def __init__(
        self, store: EmbeddingStore, columns: list[str] | None = None, kept_groups: int = 16
    ) -> None:
        self._store = store
        self._columns = columns
        self._kept_groups = kept_groups
        # by bucket, then row group
        self._cache: dict[int, OrderedDict[int, Future[pa.RecordBatch]]] = {}
        self._metadata: dict[int, pq.FileMetaData] = {}  # of shards, as far as they were opened
        self._opening: dict[int, Lock] = {}  # of shards
        self.damaged: set[int] = set()  # row groups, numbered through all shards

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        shards = self._store.manifest.shards
        return [(s, g) for s, entry in enumerate(shards) for g in range(len(entry.row_groups))]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        shards = self._store.manifest.shards
        return np.cumsum([group.rows for entry in shards for group in entry.row_groups])

    @property
    def group_rows(self) -> list[NDArray[np.int64]]:
        """Row numbers of each row group."""
        return np.split(np.arange(self._ends[-1]), self._ends[:-1])

    def group_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row groups, numbered through all shards, that rows are in."""
        return np.searchsorted(self._ends, numbers, side="right")

    def group_name(self, group: int) -> str:
        """A row group as messages name it."""
        shard, number = self._groups[group]
        return f"row group {number} of {self._store.manifest.shards[shard].path}"

    def is_readable(self, group: int) -> bool:
        """Whether a row group is there and whole; it is tried twice before it is given up.

        Raises:
            StoreError: the storage doesn't answer, which says nothing of the row group.
        """
        for _ in range(2):
            if group in self.damaged:
                return False
            try:
                self._row_groups([group])
            except DamageError:
                continue
            return True
        self.damaged.add(group)
        return False

    def rows(
        self, numbers: NDArray[np.int64], following: NDArray[np.int64] | None = None
    ) -> pa.Table:
        """The rows with these numbers as they lie on disk, in this order.

        Args:
            numbers: of the rows.
            following: rows that will be asked for next; reading their row groups is begun.

        Raises:
            StoreError: a row group can't be read; names shard and row group.
        """
        owners = self.group_of(numbers)
        found, indices = np.unique(owners, return_inverse=True)
        groups = self._row_groups(found.tolist(), following)
        places = numbers - np.concatenate([[0], self._ends])[owners]
        return _cut([groups[group] for group in found.tolist()], indices, places)

    def _row_groups(
        self, numbers: list[int], following: NDArray[np.int64] | None = None
    ) -> dict[int, pa.RecordBatch]:
        """Row groups by number; those that aren't in memory are read side by side."""
        started = self._start(numbers)
        if following is not None:
            upcoming = np.unique(self.group_of(following)).tolist()
            self._start([group for group in upcoming if group not in self.damaged])
        found = {}
        for number, reading in started.items():
            try:
                found[number] = reading.result()
            except BaseException:
                self._cache_of(number).pop(number, None)  # whoever asks again has it read again
                raise
        return found

    def _start(self, numbers: list[int]) -> dict[int, Future[pa.RecordBatch]]:
        """Row groups that are in memory or on their way there; those started last stay longest."""
        started = {}
        for number in numbers:
            kept = self._cache_of(number)
            if number not in kept:
                kept[number] = self._pool.submit(self._read, number)
            kept.move_to_end(number)
            started[number] = kept[number]
            if len(kept) > max(self._kept_groups, len(numbers)):
                kept.popitem(last=False)
        return started

    def close(self) -> None:
        """End what is read ahead; returns once no read is under way."""
        self._pool.shutdown(cancel_futures=True)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The store's file system and folder: one client for all files."""
        return storage.filesystem(self._store.uri)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READS, thread_name_prefix="row-groups")

    def _cache_of(self, number: int) -> OrderedDict[int, Future[pa.RecordBatch]]:
        """The row groups in memory, or on their way there, of a row group's bucket."""
        shard, group = self._groups[number]
        bucket = self._store.manifest.shards[shard].row_groups[group].bucket
        return self._cache.setdefault(bucket, OrderedDict())

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._metadata:
            with self._opening.setdefault(shard, Lock()):  # each file's end is read once
                if shard not in self._metadata:
                    self._metadata[shard] = self._opened(shard).metadata
        return self._opened(shard)

    def _opened(self, shard: int) -> pq.ParquetFile:
        path = self._store.manifest.shards[shard].path
        system, folder = self._place
        place = system, f"{folder}/{path}"
        return _open_shard(self._store.uri, path, self._metadata.get(shard), place)

    def _read(self, number: int) -> pa.RecordBatch:
        shard, group = self._groups[number]
        path, file = self._store.manifest.shards[shard].path, self._file(shard)
        table = _read_row_group(self._store.uri, path, group, file, self._columns)
        return table.combine_chunks().to_batches()[0]


def read_manifest(uri: str) -> StoreManifest:
    """Read and validate ``manifest.json``.

    Raises:
        StoreError: it is missing, unreadable or of another version.
    """
    try:
        content = storage.read_bytes(storage.join(uri, MANIFEST))
    except FileNotFoundError as error:
        raise StoreError(
            f"no embedding store at {uri}: {MANIFEST} is missing; make it with `piflow embed`"
        ) from error
    try:
        tree = json.loads(content)
        version = tree["inputs"]["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{MANIFEST} of embedding store {uri} is corrupt; {_REMEDY}") from error
    if version not in (SCHEMA_VERSION, SCHEMA_VERSION_WITH_LATENTS):
        raise StoreError(
            f"embedding store {uri} has format version {version}, this piflow reads "
            f"{SCHEMA_VERSION} and {SCHEMA_VERSION_WITH_LATENTS}; remove the folder and make the "
            "store anew with `piflow embed`"
        )
    try:
        return StoreManifest.model_validate(tree)
    except ValidationError as error:
        raise StoreError(
            f"{MANIFEST} of embedding store {uri} is corrupt; {_REMEDY}:\n{error}"
        ) from error


def require_same_inputs(uri: str, found: StoreInputs, expected: StoreInputs) -> None:
    """Check that a store's folder belongs to the job at hand.

    Raises:
        StoreError: it was built for another encoder, or from other prompts or settings.
    """
    if found == expected:
        return
    if found.encoder != expected.encoder:
        raise StoreError(_other_encoder(uri, found.encoder, expected.encoder))
    ours, theirs = expected.model_dump(mode="json"), found.model_dump(mode="json")
    changes = [
        f"{key}: {theirs[key]} there, {ours[key]} in the recipe"
        for key in ours
        if ours[key] != theirs[key]
    ]
    raise StoreError(
        f"the folder {uri} holds an embedding store of other inputs ({'; '.join(changes)}); "
        "choose another embed.store or remove the folder"
    )


def _other_encoder(uri: str, found: EncoderIdentity, expected: EncoderIdentity) -> str:
    return (
        f"embedding store {uri} was built for another encoder: it holds {found}, the recipe asks "
        f"for {expected}; choose another embed.store, remove the folder, or set the recipe's "
        "encoder to the store's"
    )


def _open_parquet(
    uri: str, metadata: pq.FileMetaData | None = None, place: tuple[Any, str] | None = None
) -> pq.ParquetFile:
    system, path = place or storage.filesystem(uri)
    return pq.ParquetFile(
        system.open_input_file(path),
        metadata=metadata,
        pre_buffer=True,
        page_checksum_verification=True,
    )


def _open_shard(
    store_uri: str,
    path: str,
    metadata: pq.FileMetaData | None = None,
    place: tuple[Any, str] | None = None,
) -> pq.ParquetFile:
    uri = storage.join(store_uri, path)
    try:
        with storage.explained(uri):
            return _open_parquet(uri, metadata, place)
    except (pa.ArrowException, OSError) as error:
        raise _trouble(store_uri, path)(
            f"cannot open {path} of embedding store {store_uri}: {error}; if it is damaged, "
            f"{_REMEDY}"
        ) from error


def _trouble(store_uri: str, path: str) -> type[StoreError]:
    """Whose fault it is that a file can't be read: its own, if the storage answers for it."""
    system, name = storage.filesystem(storage.join(store_uri, path))
    try:
        with system.open_input_file(name) as file:
            file.read(1)
    except FileNotFoundError:
        return DamageError
    except OSError:
        return StoreError
    return DamageError


def _read_row_group(
    store_uri: str,
    path: str,
    group: int,
    file: pq.ParquetFile | None,
    columns: list[str] | None,
) -> pa.Table:
    file = file or _open_shard(store_uri, path)
    try:
        return _read_again(storage.join(store_uri, path), group, file, columns)
    except (pa.ArrowException, OSError) as error:
        raise _trouble(store_uri, path)(
            f"cannot read row group {group} of {path} in embedding store {store_uri}: {error}; "
            f"if it is damaged, {_REMEDY}"
        ) from error


def _read_again(uri: str, group: int, file: pq.ParquetFile, columns: list[str] | None) -> pa.Table:
    """A row group; if it can't be read, from the file opened anew: keys may have been renewed.

    Without Arrow's threads: row groups are read side by side, and Arrow has one where
    `OMP_NUM_THREADS` is 1, as Ray sets it.
    """
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
    except OSError:
        with storage.explained(uri):
            file = _open_parquet(uri)
            return file.read_row_group(group, columns=columns, use_threads=False)
