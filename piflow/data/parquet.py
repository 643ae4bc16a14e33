"""Opens Parquet files on any storage, and reads what piflow writes into their footers."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from piflow import storage
from piflow.storage.foreign import parse_object

METADATA_KEY = b"piflow"  # of a shard's footer: JSON that says what its rows were made from


def open_parquet(
    uri: str, metadata: pq.FileMetaData | None = None, place: tuple[Any, str] | None = None
) -> pq.ParquetFile:
    system, path = place or storage.filesystem(uri)
    return pq.ParquetFile(
        system.open_input_file(path),
        metadata=metadata,
        pre_buffer=True,
        page_checksum_verification=True,
    )


def shard_facts(file: pq.ParquetFile) -> dict[str, Any]:
    """What `write_shard` says of a shard in its footer; {} if it says nothing.

    Raises:
        ForeignDataError: it isn't a JSON object, or one that is too large.
    """
    content = (file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}")
    return parse_object(content, where="the footer")
