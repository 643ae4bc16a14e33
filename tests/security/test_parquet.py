"""Parquet files whose page headers lie, or whose pages are bombs: refused before they unpack."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piflow.data import parquet_pages, prompt_rows
from piflow.data.parquet import ParquetFile
from piflow.data.parquet_pages import Pages, read_pages
from piflow.data.prompt_rows import Columns, read_rows
from piflow.storage.foreign import ForeignDataError

MIB = 2**20
PLAIN, RLE, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 3, 7, 8
PROMPT = Columns("prompt", None, None, None)


# ------------------------------------------------------------------------- writing page headers


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def encoded(fields: Sequence[tuple[int, Any]]) -> bytes:
    """A struct of Thrift's compact protocol: numbers of 32 bits, bytes, and structs as lists."""
    out, last = b"", 0
    for number, value in fields:
        kind = 5 if isinstance(value, int) else 8 if isinstance(value, bytes) else 12
        step = number - last
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + varint(2 * number)
        if isinstance(value, int):
            out += varint(2 * value if value >= 0 else -2 * value - 1)
        else:
            out += varint(len(value)) + value if isinstance(value, bytes) else encoded(value)
        last = number
    return out + b"\0"


def data_page(values: int, unpacked: int, packed: bytes, encoding: int = PLAIN) -> bytes:
    details = [(1, values), (2, encoding), (3, RLE), (4, RLE)]
    return encoded([(1, 0), (2, unpacked), (3, len(packed)), (5, details)]) + packed


def dictionary_page(values: int, unpacked: int, packed: bytes) -> bytes:
    return (
        encoded([(1, 2), (2, unpacked), (3, len(packed)), (7, [(1, values), (2, PLAIN)])]) + packed
    )


def text_page(size: int, codec: str = "zstd", first: str = "x") -> bytes:
    """Packed: one text of so many bytes."""
    raw = struct.pack("<I", size) + first.encode() + bytes(size - 1)
    if codec == "gzip":
        return zlib.compress(raw, 9, 31)
    return bytes(pa.compress(raw, codec, asbytes=True))


def overwrite(path: Path, pages: bytes, group: int = 0, column: int = 0) -> None:
    """Put other pages in place of a column's first ones; footer and size of the file stay."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    assert len(pages) <= chunk.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + len(pages)] = pages
    path.write_bytes(content)


def hostile(
    path: Path, pages: bytes, *, rows: int = 1, codec: str = "zstd", dictionary: bool = False
) -> Path:
    """A file with a harmless footer of so many texts, whose pages are these."""
    filler = np.random.default_rng(0).bytes(len(pages) + 1000).hex()  # packs to half
    texts = [filler, *[""] * (rows - 1)]
    schema = pa.schema([pa.field("prompt", pa.string(), nullable=False)])
    table = pa.table([pa.array(texts)], schema=schema)
    pq.write_table(table, path, compression=codec, use_dictionary=dictionary)
    overwrite(path, pages)
    return path


@contextmanager
def arrow_memory() -> Iterator[Callable[[], int]]:
    """The most bytes that Arrow has held since then."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        yield pool.max_memory
    finally:
        pa.set_memory_pool(before)


# ------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("codec", ["zstd", "gzip", "snappy", "brotli"])
def test_a_page_is_not_unpacked_beyond_its_limit(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB in one page of a column that has a few kilobytes by its footer."""
    monkeypatch.setattr(prompt_rows, "MAX_PAGE_BYTES", 4 * MIB)
    packed = text_page(64 * MIB, codec)
    path = hostile(tmp_path / "p.parquet", data_page(1, 64 * MIB + 4, packed), codec=codec)
    assert path.stat().st_size < 64 * MIB / 7
    with arrow_memory() as most, pytest.raises(
        ValueError, match=r"p.parquet: column 'prompt' of row group 0: a page takes 67108868 bytes"
    ):  # fmt: skip
        list(read_rows(str(path), PROMPT))
    assert most() < 4 * MIB


def test_without_its_limit_the_page_would_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_rows, "MAX_LINE_BYTES", 100 * MIB)
    pages = data_page(1, 64 * MIB + 4, text_page(64 * MIB))
    path = hostile(tmp_path / "p.parquet", pages)
    with arrow_memory() as most:
        [row] = read_rows(str(path), PROMPT)
    assert len(row.text) == 64 * MIB and most() > 64 * MIB


@pytest.mark.parametrize("codec", ["zstd", "gzip", "snappy", "brotli"])
def test_no_codec_unpacks_more_than_the_header_says(tmp_path: Path, codec: str) -> None:
    """What the limits rest on: Arrow gives a codec so much room, and ends when it's too little."""
    path = hostile(
        tmp_path / "p.parquet", data_page(1, 1000, text_page(64 * MIB, codec)), codec=codec
    )
    with arrow_memory() as most, pytest.raises(ValueError, match="p.parquet is not readable"):
        list(read_rows(str(path), PROMPT))
    assert most() < 12 * MIB  # the file itself, where it's read as it lies there


def test_a_page_may_unpack_as_far_as_real_texts_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for small files that become large ones."""
    monkeypatch.setattr(prompt_rows, "MAX_PAGE_BYTES", 1000)
    texts = [np.random.default_rng(number).bytes(50).hex() for number in range(1000)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": texts}), path, use_dictionary=False, compression="zstd")
    assert [row.text for row in read_rows(str(path), PROMPT)] == texts


def test_the_claims_of_a_dictionary_are_limited(tmp_path: Path) -> None:
    """pyarrow takes 16 bytes for each value that is claimed, 32 GiB here."""
    empty = bytes(pa.compress(bytes(100), "zstd", asbytes=True))
    pages = dictionary_page(2**31 - 1, 100, empty) + data_page(1, 100, empty, RLE_DICTIONARY)
    path = hostile(tmp_path / "p.parquet", pages, dictionary=True)
    with arrow_memory() as most, pytest.raises(
        ValueError, match="a dictionary of 2147483647 values, at most 16777216"
    ):  # fmt: skip
        list(read_rows(str(path), PROMPT))
    assert most() < MIB


def test_pages_are_limited_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_rows, "MAX_CHUNK_BYTES", 10 * MIB)
    pages = b"".join(data_page(1, 2 * MIB + 4, text_page(2 * MIB, first=c)) for c in "abcdefgh")
    path = hostile(tmp_path / "p.parquet", pages, rows=8)
    with pytest.raises(ValueError, match=r"its pages take 16777\d+ bytes unpacked, at most 10485"):
        list(read_rows(str(path), PROMPT))


def test_texts_that_share_their_beginnings_are_read_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 texts of 1 MB in a page of 1 MB: 2 GB, if they were decoded at once."""
    monkeypatch.setattr(prompt_rows, "_BATCH_BYTES", 8 * MIB)
    path = tmp_path / "p.parquet"
    pq.write_table(
        pa.table({"prompt": ["x" * MIB] * 2000}), path, compression="zstd",
        use_dictionary=False, column_encoding={"prompt": "DELTA_BYTE_ARRAY"},
    )  # fmt: skip
    assert path.stat().st_size < 5000
    with arrow_memory() as most:
        rows = read_rows(str(path), PROMPT)
        assert all(len(next(rows).text) == MIB for _ in range(50))
        rows.close()  # type: ignore[attr-defined]
    assert most() < 50 * MIB


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (pa.list_(pa.int32()), "list<"),
        (pa.map_(pa.string(), pa.string()), "map<"),
        (pa.struct([("bytes", pa.list_(pa.binary()))]), "struct<"),
        (pa.struct([("a", pa.struct([("bytes", pa.binary())]))]), "struct<"),
        (pa.binary(2**20), "fixed_size_binary"),
    ],
)
def test_columns_of_which_one_row_may_be_anything_are_not_decoded(
    tmp_path: Path, kind: Any, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array([None] * 3, kind)}), path)
    monkeypatch.setattr(ParquetFile, "batches", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=f"column 'prompt' holds {shown}.*; expected texts"):
        list(read_rows(str(path), PROMPT))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_every_kind_of_text_is_limited(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_rows, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(prompt_rows, "MAX_PICTURE_BYTES", 1000)
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["a", "x" * 1001], kind)}), path)
    with pytest.raises(ValueError, match="a value of column 'prompt' has 1001 bytes; at most 1000"):
        list(read_rows(str(path), PROMPT))


def test_a_footer_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "p.parquet").open("wb") as file:
        file.write(b"PAR1")
        file.truncate(3 * 2**30)
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<I", 2 * 2**30) + b"PAR1")
    with arrow_memory() as most, pytest.raises(ValueError, match="the footer has 2147483656 bytes"):
        list(read_rows(str(tmp_path / "p.parquet"), PROMPT))
    assert most() < MIB


def test_a_long_footer_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = pa.table({"prompt": ["a"]} | {f"column {number}": [number] for number in range(2000)})
    pq.write_table(table, path)
    assert int.from_bytes(path.read_bytes()[-8:-4], "little") > 2**17
    assert [row.text for row in read_rows(str(path), PROMPT)] == ["a"]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 11, 12, 100])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a" * 100]}), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="p.parquet is not readable Parquet"):
        list(read_rows(str(path), PROMPT))


def test_a_column_with_a_dot_in_its_name_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"the.text": ["a", "b"]}), path)
    columns = Columns("the.text", None, None, None)
    assert [row.text for row in read_rows(str(path), columns)] == ["a", "b"]
    monkeypatch.setattr(prompt_rows, "MAX_CHUNK_BYTES", 10)
    with pytest.raises(ValueError, match="column 'the.text' takes more than 10 bytes"):
        list(read_rows(str(path), columns))


# ------------------------------------------------------------------------------------- headers


GOOD = [(1, 0), (2, 8), (3, 8), (5, [(1, 2), (2, PLAIN), (3, RLE), (4, RLE)])]


def test_a_header_is_read_as_it_was_written() -> None:
    pages = read_pages(memoryview(encoded(GOOD) + bytes(8)), 2)
    assert pages == Pages(1, 8, 8 + len(encoded(GOOD)), [2], 0, {"PLAIN"})
    spare = [*GOOD[:3], (4, 17), GOOD[3], (40, b"later"), (41, [(1, b""), (2, [(1, 3)])])]
    content = encoded(spare) + bytes(8)
    assert read_pages(memoryview(content * 2 + b"rubbish"), 4).values == [2, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "page 1 has no end"),
        (encoded(GOOD)[:-1], "no end"),
        (encoded(GOOD), "goes on after the column's end"),
        (encoded(GOOD[1:]) + bytes(8), "no usable value in field 1"),
        (encoded([GOOD[0], *GOOD[2:]]) + bytes(8), "no usable value in field 2"),
        (encoded([*GOOD[:2], GOOD[3]]) + bytes(8), "no usable value in field 3"),
        (encoded(GOOD[:3]) + bytes(8), "isn't that of a data page"),
        (encoded([(1, 2), *GOOD[1:]]) + bytes(8), "isn't that of a data page"),
        (encoded([(1, 9), *GOOD[1:]]) + bytes(8), "isn't that of a data page"),
        (encoded([*GOOD[:3], (5, [(1, -2), (2, 0)])]) + bytes(8), "no usable value in field 1"),
        (encoded([*GOOD[:3], (5, [(2, 0)])]) + bytes(8), "no usable value in field 1"),
        (encoded([*GOOD[:1], (2, -8), *GOOD[2:]]) + bytes(8), "no usable value in field 2"),
        (encoded([*GOOD[:2], (3, -8), GOOD[3]]) + bytes(8), "no usable value in field 3"),
        (encoded([*GOOD[:3], (3, 8), GOOD[3]]) + bytes(8), "has field 3 twice"),
        (encoded([*GOOD[:3], (4, [(1, [(1, [(1, [(1, [])])])])])]), "a field of kind 12"),
        (b"\x15" + b"\xff" * 30, "a number of more than 32 bits"),
        (b"\x15\xff\xff\xff\xff\x1f", "a number of more than 32 bits"),
        (b"\x19\xf5" + varint(2**31), "a field of kind 9"),
        (b"\x18" + varint(2**31), "no end"),
    ],
)
def test_a_header_that_can_be_understood_in_two_ways_is_refused(
    content: bytes, message: str
) -> None:
    with pytest.raises(ForeignDataError, match=message):
        read_pages(memoryview(content), 2)


def test_pages_without_values_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_PAGES", 1000)
    empty = encoded([(1, 0), (2, 0), (3, 0), (5, [(1, 0), (2, 0), (3, RLE), (4, RLE)])])
    with pytest.raises(ForeignDataError, match="more than 1000 pages"):
        read_pages(memoryview(empty * 2000), 1)


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_to_be_refused(content: bytes) -> None:
    try:
        read_pages(memoryview(content), 1)
    except ForeignDataError as error:
        assert re.match("the header of page|it has more than", str(error))


texts = st.lists(st.none() | st.text(max_size=20), min_size=1, max_size=60)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=texts,
    codec=st.sampled_from(["none", "snappy", "gzip", "brotli", "zstd", "lz4"]),
    dictionary=st.booleans(),
    version=st.sampled_from(["1.0", "2.0"]),
    page=st.sampled_from([1, 50, 10**6]),
    group=st.integers(1, 60),
    statistics=st.booleans(),
)
def test_what_pyarrow_writes_is_read_and_counted(
    tmp_path: Path, values: list[str | None], codec: str, dictionary: bool, version: str,
    page: int, group: int, statistics: bool,
) -> None:  # fmt: skip
    """Same values, and page headers that add up to what the footer says."""
    table = pa.table(
        {
            "prompt": pa.array(values, pa.string()),
            "image": [{"bytes": b"x", "path": v} for v in values],
        }
    )
    path = tmp_path / "p.parquet"
    pq.write_table(
        table, path, compression=codec, use_dictionary=dictionary, data_page_version=version,
        data_page_size=page, write_batch_size=3, row_group_size=group,
        write_statistics=statistics, write_page_checksum=True,
    )  # fmt: skip
    told = []

    def check(chunk: Any, pages: Pages) -> None:
        assert pages.total == chunk.total_uncompressed_size
        assert pages.num_values == chunk.num_values
        told.append(chunk.path_in_schema)

    with pa.OSFile(str(path)) as source:
        file = ParquetFile(source, check)
        found = [file.read_row_group(number) for number in range(file.num_row_groups)]
    assert pa.concat_tables(found) == table
    assert told == ["prompt", "image.bytes", "image.path"] * file.num_row_groups
    rows = list(read_rows(str(path), Columns("prompt", None, None, "image")))
    assert [(row.text, row.picture["path"]) for row in rows] == [(v, v) for v in values]


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 100)), min_size=1, max_size=20),
    size=st.integers(1, 1000),
)
def test_so_many_rows_take_no_more_than_they_may(sizes: list[tuple[int, int]], size: int) -> None:
    """Counted for every place where a batch may begin; pages as (values, bytes)."""
    pages = Pages(values=[n for n, _ in sizes], largest=max(b for _, b in sizes))
    rows = pages.rows_within(size)
    owners = [number for number, (n, _) in enumerate(sizes) for _ in range(n)]
    for start in range(len(owners)):
        touched = set(owners[start : start + rows])
        assert sum(sizes[number][1] for number in touched) <= max(size, 2 * pages.largest)
    pages.dictionary_values = 1
    assert pages.rows_within(size) == 1 or pages.rows_within(size) * pages.largest <= size
