"""Opens Parquet files on any storage."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from piflow import storage


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
