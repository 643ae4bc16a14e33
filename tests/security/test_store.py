"""Stores that somebody else wrote: manifests that contradict themselves, files that are bombs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piflow.data.blocks import LocalReader
from piflow.data.manifest import DamagedRows, DamageError, StoreError, read_manifest
from piflow.data.reader import EmbeddingStore
from piflow.data.rows import SCHEMA
from piflow.data.stream import TrainStream
from tests.security.test_parquet import (
    DELTA_BYTE_ARRAY,
    arrow_memory,
    data_page,
    dictionary_page,
    overwrite,
    text_page,
)

FORMATS = Path(__file__).parents[1] / "golden" / "formats"
HARMLESS = ("truncated_prompts",)  # told to people alone; at most the number of rows


@pytest.fixture(params=["gm", "pictures"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of 8 prompts; one of two sizes with a negative prompt, the other with latents."""
    return Path(shutil.copytree(FORMATS / request.param / "store", tmp_path / "store"))


@pytest.fixture
def gm(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMATS / "gm" / "store", tmp_path / "store"))


def tree_of(store: Path) -> dict[str, Any]:
    tree = json.loads((store / "manifest.json").read_text())
    assert isinstance(tree, dict)
    return tree


def put(store: Path, tree: Any) -> None:
    (store / "manifest.json").write_text(json.dumps(tree))


def leaves(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in pairs:
            yield from leaves(child, (*place, key))
    else:
        yield place, tree


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(tree))
    node = copy
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return copy


def use_all(store: Path, damaged_rows: DamagedRows = "stop") -> None:
    """Everything that is ever read of a store."""
    opened = EmbeddingStore.open(str(store), damaged_rows)
    opened.read(range(opened.manifest.num_rows))
    opened.empty_prompt()
    opened.verify()


def test_stores_of_version_0_1_0_are_read(store: Path) -> None:
    use_all(store)
    use_all(store, "replace")


def test_every_number_is_compared_with_the_others(store: Path) -> None:
    """One number at a time is another one: refused when it is opened, or before it is used."""
    tree = tree_of(store)
    numbers = [(place, value) for place, value in leaves(tree) if isinstance(value, int)]
    assert len(numbers) > 25
    for place, value in numbers:
        wrong: list[Any] = [value + 1, value - 1, 0, -value - 1, 10 * value + 7, 2**62, 10**400]
        for other in [*wrong, value + 0.5, float(value), True, str(value), None, [value]]:
            if place == HARMLESS and type(other) is int and 0 <= other <= 8:
                continue
            if type(other) is int and other == value:
                continue
            put(store, changed(tree, place, other))
            with pytest.raises(StoreError):
                use_all(store)
                pytest.fail(f"{place} = {other!r} in place of {value!r} was taken")


def test_every_text_is_compared_too(store: Path) -> None:
    tree = tree_of(store)
    texts = [(place, value) for place, value in leaves(tree) if isinstance(value, str)]
    for place, value in texts:
        for other in [value + "x", "", "../" + value, "/etc/passwd", 3, None]:
            put(store, changed(tree, place, other))
            with pytest.raises(StoreError):
                use_all(store)
                pytest.fail(f"{place} = {other!r} in place of {value!r} was taken")


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_mutation_is_refused_or_leaves_the_rows_as_they_are(
    gm: Path, data: st.DataObject
) -> None:
    """Several values at once, keys that are gone or new, lists that are longer or shorter."""
    good = json.loads((FORMATS / "gm" / "store" / "manifest.json").read_text())
    tree = json.loads(json.dumps(good))
    for _ in range(data.draw(st.integers(1, 3))):
        place, value = data.draw(st.sampled_from(list(leaves(tree))))
        node = tree
        for key in place[:-1]:
            node = node[key]
        kind = data.draw(st.sampled_from(["value", "gone", "more"]))
        if kind == "value":
            near = st.just(value + data.draw(st.integers(-3, 3)) if type(value) is int else value)
            node[place[-1]] = data.draw(near | st.integers() | st.text(max_size=5) | st.none())
        elif kind == "gone":
            del node[place[-1]]
        elif isinstance(node, list):
            node.append(value)
        else:
            node[data.draw(st.text(min_size=1, max_size=5))] = value
    put(gm, tree)
    try:
        use_all(gm)
    except StoreError:
        return
    found = read_manifest(str(gm)).model_dump(mode="json")
    differing = [key for key in found if found[key] != good[key]]
    assert differing in ([], ["truncated_prompts"]), "what else may differ?"


def test_a_bucket_with_a_row_too_many_no_longer_makes_the_stream_loop(gm: Path) -> None:
    tree = tree_of(gm)
    tree["buckets"][0]["rows"] += 1
    put(gm, tree)
    with pytest.raises(StoreError, match="bucket 0 has 4 rows, its row groups hold 3; delete"):
        TrainStream(
            str(gm), seed=1, batch_size=4, micro_batch_size=4, rank=0, world_size=1,
            reader=LocalReader(),
        )  # fmt: skip


@pytest.mark.parametrize("damaged_rows", ["stop", "replace"])
@pytest.mark.parametrize("name", ["../other/shard-00000.parquet", "/etc/hostname", "a/../b", "x\0"])
def test_a_manifest_names_no_file_elsewhere(gm: Path, name: str, damaged_rows: DamagedRows) -> None:
    shutil.copytree(gm, gm.parent / "other")
    for key in ("shards", "empty_prompt", "negative_prompts"):
        tree = tree_of(gm.parent / "other")
        entry = tree[key][0] if isinstance(tree[key], list) else tree[key]
        entry["path"] = name
        put(gm, tree)
        with pytest.raises(StoreError, match="contradicts itself"):
            EmbeddingStore.open(str(gm), damaged_rows)


def test_what_is_written_in_a_manifest_reaches_no_terminal_raw(gm: Path) -> None:
    tree = tree_of(gm)
    hostile = "\x1b[2J\u202e"
    for bad in (
        changed(tree, ("inputs", "schema_version"), hostile),
        tree | {hostile: 1},
        changed(tree, ("shards", 0, "path"), hostile),
        changed(tree, ("inputs_sha256",), hostile),
    ):
        put(gm, bad)
        with pytest.raises(StoreError) as caught:
            read_manifest(str(gm))
        assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)
        assert "\\x1b" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["[" * 10**6, '{"inputs":' * 10**5, "null", "", "{}", '{"inputs": 3}', '{"a": 1, "a": 2}'],
)
def test_json_that_is_no_manifest(gm: Path, content: str) -> None:
    (gm / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest.json of embedding store .* is corrupt"):
        read_manifest(str(gm))


# ------------------------------------------------------------------------------------ Parquet files


def replaced(store: Path, name: str, table: pa.Table, **options: Any) -> None:
    """A file of the store is another one, and the manifest has its size."""
    options = {"row_group_size": table.num_rows, "use_dictionary": False} | options
    pq.write_table(table, store / name, **options)
    tree = tree_of(store)
    for entry in [*tree["shards"], tree["empty_prompt"], *tree["negative_prompts"]]:
        if entry["path"] == name:
            entry["bytes"] = (store / name).stat().st_size
    put(store, tree)


def group_of(store: Path, name: str) -> pa.Table:
    return pq.ParquetFile(store / name).read()


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    field = SCHEMA.field(name)
    index = table.column_names.index(name)
    return table.set_column(index, field, pa.array(values, field.type))


def test_a_small_file_that_is_gigabytes_is_refused_by_its_footer(gm: Path) -> None:
    """A dictionary's one value of 1 MB stands for 5,000 rows: 5 GB out of a few kilobytes."""
    name = "shard-00001.parquet"
    table = group_of(gm, name)
    rows = pa.concat_tables([table.slice(0, 1)] * 5000)
    text = pa.array(["x" * 2**20]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), text.dictionary)
    bomb = rows.set_column(1, "prompt", column)
    replaced(gm, name, bomb, use_dictionary=["prompt"], compression="zstd", store_schema=False)
    assert (gm / name).stat().st_size < 2**20
    began = time.monotonic()
    with pytest.raises(DamageError, match=r"shard-00001.parquet .* isn't what the manifest says"):
        EmbeddingStore.open(str(gm)).read([7])
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda t: t, {"use_dictionary": ["prompt"]}, "has prompt encoded as .*DICTIONARY"),
        (
            lambda t: t,
            {"column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
            "has prompt encoded as .*DELTA_BYTE_ARRAY",
        ),
        (
            lambda t: with_column(t, "prompt", ["x" * 2**23] * 2),
            {"compression": "zstd"},
            r"says that prompt takes \d+ bytes; at most",
        ),
        (lambda t: t, {"row_group_size": 1}, r"row groups have \[1, 1\] rows, the manifest says"),
        (lambda t: t.slice(0, 1), {}, r"row groups have \[1\] rows, the manifest says \[2\]"),
        (lambda t: t.drop_columns(["scale"]), {}, "expected the columns .*scale"),
        (lambda t: t.append_column("\x1b[2J", pa.array([1, 2])), {}, r"\\x1b\[2J .* differs"),
        (lambda t: t.replace_schema_metadata({}), {}, "was made from inputs None"),
        (lambda t: t.replace_schema_metadata({"piflow": "[" * 10**5}), {}, "nests JSON deeper"),
        (lambda t: with_column(t, "num_tokens", [1, 10**9]), {}, "more than 12 tokens"),
        (lambda t: with_column(t, "num_tokens", [1, -1]), {}, "fewer than 0"),
        (lambda t: with_column(t, "tokens", [b"", b""]), {}, "bytes aren't those of its tokens"),
        (lambda t: with_column(t, "scale", [1.0, float("nan")]), {}, "scale isn't finite"),
        (lambda t: with_column(t, "height", [8, 9]), {}, "height isn't its bucket's, 8 pixels"),
        (lambda t: with_column(t, "pooled", [b"1234", None]), {}, "1 of 2 rows have no pooled"),
        (lambda t: with_column(t, "pooled", [b"1234", b"12345678"]), {}, "pooled vectors aren't"),
    ],
)
def test_a_shard_that_isnt_what_the_manifest_says(
    gm: Path, change: Callable[[pa.Table], pa.Table], options: dict[str, Any], expected: str
) -> None:
    name = "shard-00001.parquet"  # rows 6 and 7
    replaced(gm, name, change(group_of(gm, name)), **options)
    store = EmbeddingStore.open(str(gm))
    store.read([5])  # of the other shard
    with pytest.raises(DamageError, match=f"(?s){expected}"):
        store.read([7])
    replacing = EmbeddingStore.open(str(gm), "replace")
    assert len(replacing.first_by_hash(6).prompts) == 6
    with pytest.raises(ValueError, match="7 prompts were asked .* which holds 6"):
        replacing.first_by_hash(7)  # damaged rows are left out


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        (data_page(2, 2**26 + 4, text_page(2**26)), r"its pages take 6710\d+ bytes unpacked"),
        (data_page(2**31 - 1, 100, bytes(100)), "its pages hold 2147483647 values"),
        (data_page(1, 1, b"x") + data_page(2, 1, b"x"), "its pages hold 3 values"),
        (data_page(2, 100, bytes(100), DELTA_BYTE_ARRAY), "encoded as DELTA_BYTE_ARRAY"),
        (data_page(2, 100, bytes(100), 77), "its pages are encoded as 77"),
        (
            dictionary_page(2**31 - 1, 9, b"x") + data_page(2, 9, b"x"),
            "and 2147483647 in a dictionary; the footer says 2 and 0",
        ),
        (b"\xff" * 100, "the header of page 1 has a field of kind 15"),
    ],
)
def test_pages_agree_with_the_footer(gm: Path, pages: bytes, expected: str) -> None:
    name = "shard-00001.parquet"
    texts = [np.random.default_rng(number).bytes(100_000).hex() for number in range(2)]
    replaced(gm, name, with_column(group_of(gm, name), "prompt", texts), compression="zstd")
    overwrite(gm / name, pages, column=1)
    store = EmbeddingStore.open(str(gm))
    with arrow_memory() as most, pytest.raises(DamageError, match=f"column 'prompt'.*{expected}"):
        store.read([7])
    assert most() < 2**20
    assert len(EmbeddingStore.open(str(gm), "replace").first_by_hash(6).prompts) == 6


def test_the_empty_prompts_file_is_compared_as_well(gm: Path) -> None:
    table = group_of(gm, "empty-prompt.parquet")
    replaced(gm, "empty-prompt.parquet", with_column(table, "height", [16]))
    with pytest.raises(DamageError, match="height isn't its bucket's, 0 pixels"):
        EmbeddingStore.open(str(gm)).empty_prompt()


def test_a_list_of_nulls_takes_no_memory(tmp_path: Path) -> None:
    """A million of them are a few bytes on disk."""
    store = Path(shutil.copytree(FORMATS / "pictures" / "store", tmp_path / "store"))
    name = "shard-00001.parquet"
    table = group_of(store, name).slice(0, 2)
    index = table.column_names.index("latent_shape")
    shapes = pa.array([[None] * 10**6] * 2, pa.list_(pa.int32()))
    tables = [group_of(store, name).slice(0, 2), group_of(store, name).slice(2, 2)]
    hostile = pa.concat_tables(
        [part.set_column(index, table.schema.field(index), shapes) for part in tables]
    )
    replaced(store, name, hostile, row_group_size=2)
    assert (store / name).stat().st_size < 20000
    with pytest.raises(DamageError, match="2000000 values of latent_shape.* in 2 rows"):
        EmbeddingStore.open(str(store)).read([7])
