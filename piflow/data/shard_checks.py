"""Whether a shard is what the manifest says: footer, pages before they are decoded, then rows.

A Parquet file of a few kilobytes can hold gigabytes: a dictionary's one value that stands for a
million rows, text that compresses well, a list of a billion nulls. `write_shard` uses neither
dictionaries nor deltas, and the manifest says how much a row group can hold, so all of these are
refused by the footer alone, and the headers of the pages have to agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from piflow.data.manifest import (
    Bucket,
    DamageError,
    ShardEntry,
    StoreInputs,
    condition_bytes,
    latent_size,
)
from piflow.data.parquet import ParquetFile, shard_facts
from piflow.data.parquet_pages import Pages
from piflow.data.rows import schema_of
from piflow.storage.foreign import ForeignDataError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # of values and of levels; others stand for more

_SHAPES = ("latent_shape", "condition_shape")

_MAX_REST = 2**18  # bytes that a row takes beside its tokens and latents: texts, pooled vector


class ContradictionError(DamageError):
    """A file that can be read and holds something else than the manifest says."""


def require_footer(
    file: ParquetFile, entry: ShardEntry, inputs: StoreInputs, buckets: Sequence[Bucket]
) -> None:
    """Compare a file's footer with its entry in the manifest.

    Args:
        file: just opened.
        entry: the file's.
        inputs: the store's.
        buckets: the store's.

    Raises:
        ContradictionError: other inputs, columns or row groups, or more than they can hold.
        ForeignDataError: what the footer says of the inputs isn't JSON.
    """
    schema = schema_of(inputs.latents, inputs.conditions, inputs.negative_prompt is not None)
    found = file.schema_arrow
    if not found.equals(schema, check_metadata=False):
        differing = set(map(_described, found)) ^ set(map(_described, schema))
        raise ContradictionError(
            f"expected the columns {', '.join(schema.names)}; "
            f"{', '.join(sorted(differing)) or 'their order'} differs"
        )
    made_from = shard_facts(file).get("inputs_sha256")
    if made_from != inputs.digest:
        raise ContradictionError(
            f"it was made from inputs {shown(made_from, 12)}, the manifest's are "
            f"{inputs.digest[:12]}"
        )
    metadata = file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    expected = [group.rows for group in entry.row_groups]
    if rows != expected or metadata.num_rows != sum(expected):
        raise ContradictionError(
            f"its row groups have {shown(rows)} rows, the manifest says {shown(expected)}"
        )
    for number, group in enumerate(groups):
        bucket = buckets[entry.row_groups[number].bucket]
        _require_size(group, number, inputs, bucket)


def _require_size(group: Any, number: int, inputs: StoreInputs, bucket: Bucket) -> None:
    """What a row group takes once it is decoded, as its footer says."""
    columns = [group.column(index) for index in range(group.num_columns)]
    for column in columns:
        name = shown(column.path_in_schema)
        if column.has_dictionary_page or not set(column.encodings) <= _ENCODINGS:
            raise ContradictionError(
                f"row group {number} has {name} encoded as {', '.join(column.encodings)}; "
                f"`piflow embed` writes {', '.join(sorted(_ENCODINGS))}"
            )
        each = 3 if column.path_in_schema.startswith(_SHAPES) else 1
        if column.num_values > each * group.num_rows:
            raise ContradictionError(
                f"row group {number} has {column.num_values} values of {name} in "
                f"{group.num_rows} rows"
            )
    states = inputs.encoder.max_tokens * inputs.encoder.hidden_size
    row = {
        "tokens": states * _width(inputs),
        "latent": latent_size(inputs, bucket),
        "condition_latent": condition_bytes(inputs, bucket),
    }
    for column in columns:
        most = _MAX_REST + row.get(column.path_in_schema, 0)
        for size in (column.total_uncompressed_size, column.total_compressed_size):
            if not 0 <= size <= group.num_rows * most + 2**16:
                raise ContradictionError(
                    f"row group {number} says that {shown(column.path_in_schema)} takes "
                    f"{size} bytes; at most {most} a row"
                )


def require_pages(column: pq.ColumnChunkMetaData, pages: Pages) -> None:
    """Compare the headers of a column's pages with the footer.

    Args:
        column: the footer's entry, which `require_footer` has compared with the manifest.
        pages: what the headers say.

    Raises:
        ForeignDataError: they unpack to more bytes, to values of another number or encoding.
    """
    if pages.total > column.total_uncompressed_size:
        raise ForeignDataError(
            f"its pages take {pages.total} bytes unpacked, the footer says "
            f"{column.total_uncompressed_size}"
        )
    if pages.num_values != column.num_values or pages.dictionary_values:
        raise ForeignDataError(
            f"its pages hold {pages.num_values} values, and {pages.dictionary_values} in a "
            f"dictionary; the footer says {column.num_values} and 0"
        )
    if not pages.encodings <= _ENCODINGS:
        raise ForeignDataError(f"its pages are encoded as {', '.join(sorted(pages.encodings))}")


def require_rows(
    table: pa.Table, entry: ShardEntry, group: int, inputs: StoreInputs, bucket: Bucket | None
) -> None:
    """Compare the rows that were read of a row group with the manifest.

    Args:
        table: its rows, of all or some columns.
        entry: the file's.
        group: the row group's number in the file.
        inputs: the store's.
        bucket: the row group's; None: a file of one prompt, which has no picture size.

    Raises:
        ContradictionError: another number of rows, another picture size, or bytes that aren't as
            many as the row's tokens and latents take.
    """
    expected = entry.row_groups[group].rows
    if table.num_rows != expected:
        raise ContradictionError(f"it holds {table.num_rows} rows, the manifest says {expected}")
    sides = (0, 0) if bucket is None else (bucket.height, bucket.width)
    for name, pixels in zip(("height", "width"), sides, strict=True):
        if name in table.column_names and not (_numbers(table, name) == pixels).all():
            raise ContradictionError(f"a row's {name} isn't its bucket's, {pixels} pixels")
    if {"num_tokens", "tokens"} <= set(table.column_names):
        _require_tokens(table, inputs)
        if inputs.negative_prompt is not None:
            _require_negatives(table, single=bucket is None)
    if "pooled" in table.column_names:
        _require_pooled(table)
    if "latent" in table.column_names:
        shape = None if bucket is None else bucket.latent_shape
        size = 0 if bucket is None else latent_size(inputs, bucket)
        _require_latents(table, "latent", "latent_shape", shape, size)
    if "condition_latent" in table.column_names:
        shape = None if bucket is None else bucket.condition_shape
        size = 0 if bucket is None else condition_bytes(inputs, bucket)
        _require_latents(table, "condition_latent", "condition_shape", shape, size)


def _require_tokens(table: pa.Table, inputs: StoreInputs) -> None:
    counts = _numbers(table, "num_tokens").astype(np.int64)
    if not ((counts >= 0) & (counts <= inputs.encoder.max_tokens)).all():
        raise ContradictionError(
            f"a row has fewer than 0 or more than {inputs.encoder.max_tokens} tokens"
        )
    expected = counts * inputs.encoder.hidden_size * _width(inputs)
    if not (_sizes(table, "tokens") == expected).all():
        raise ContradictionError("a row's bytes aren't those of its tokens")
    if "scale" in table.column_names and not np.isfinite(_numbers(table, "scale")).all():
        raise ContradictionError("a row's scale isn't finite")


def _require_negatives(table: pa.Table, single: bool) -> None:
    """Every row has a negative prompt of its own within its tokens; a file of one prompt none."""
    if not {"shared_tokens", "negative_tokens"} <= set(table.column_names):
        return
    shared, alone = (
        _numbers(table, name).astype(np.int64) for name in ("shared_tokens", "negative_tokens")
    )
    if single:
        if shared.any() or alone.any():
            raise ContradictionError("a file of one prompt has a negative prompt of its own")
        return
    own = _numbers(table, "num_tokens").astype(np.int64) - alone
    if not ((alone > 0) & (shared > 0) & (shared <= own)).all():
        raise ContradictionError("a row's negative prompt doesn't lie within its tokens")


def _require_pooled(table: pa.Table) -> None:
    missing = table["pooled"].null_count
    if missing not in (0, table.num_rows):
        raise ContradictionError(f"{missing} of {table.num_rows} rows have no pooled vector")
    sizes = set() if missing else set(_sizes(table, "pooled").tolist())
    if len(sizes) > 1 or any(size % 4 for size in sizes):
        raise ContradictionError("pooled vectors aren't all of as many float32 numbers")


def _require_latents(
    table: pa.Table, column: str, shape_column: str, shape: tuple[int, ...] | None, size: int
) -> None:
    """Latents of a bucket's shape; None: a file of one prompt, which has none."""
    if shape is None:
        if table[column].null_count != table.num_rows:
            raise ContradictionError("a file of one prompt has latents of a picture")
        return
    if any(found != list(shape) for found in table[shape_column].to_pylist()):
        raise ContradictionError(f"a row's latents aren't of its bucket's shape, {list(shape)}")
    if table[column].null_count or not (_sizes(table, column) == size).all():
        raise ContradictionError(f"a row's latents aren't {math.prod(shape)} numbers")


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    return table[name].to_numpy()


def _sizes(table: pa.Table, name: str) -> NDArray[np.int64]:
    return pc.binary_length(table[name]).to_numpy().astype(np.int64)


def _width(inputs: StoreInputs) -> int:
    """Bytes of a stored number."""
    return 1 if inputs.dtype == "fp8" else 2


def _described(field: pa.Field) -> str:
    return shown(f"{field.name} ({field.type})", 60)
