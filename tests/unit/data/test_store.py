from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from piflow.backbones.text import EncodedPrompt
from piflow.config import parse_recipe
from piflow.data.layout import ShardPlan, plan_store, require_recipes_prompts
from piflow.data.manifest import (
    Bucket,
    DamageError,
    StoreError,
    StoreInputs,
    read_manifest,
    require_same_inputs,
)
from piflow.data.prompts import Prompt
from piflow.data.reader import EmbeddingStore, RowReader
from piflow.data.rows import SCHEMA, dequantize, quantize
from piflow.data.writer import reusable_shard, write_shard
from piflow.storage.fingerprint import EncoderIdentity

MakeStore = Callable[..., EmbeddingStore]


def _value(prompt: str, height: int, width: int) -> torch.Tensor:
    """The token states that conftest's made-up encoder gives."""
    generator = torch.Generator()
    identity = Prompt(prompt, height, width).prompt_id
    generator.manual_seed(int(identity[:8], 16))
    return 3 * torch.randn(1 + int(identity[0], 16) % 5, 8, generator=generator)


def _damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


# ---------------------------------------------------------------------------------- number format


def _dequantized(content: bytes, scale: float, shape: tuple[int, int], dtype: str) -> torch.Tensor:
    out = np.full(shape, np.nan, np.float32)
    dequantize(np.frombuffer(content, np.uint8), scale, dtype, out.reshape(-1))
    return torch.from_numpy(out)


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1.0, 448.0, 3e4, 1e30])
def test_fp8_keeps_its_error_bound(magnitude: float) -> None:
    tokens = magnitude * torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) ** 3
    content, scale = quantize(tokens, "fp8")
    assert len(content) == tokens.numel()
    assert scale == pytest.approx(float(tokens.abs().max()) / 448, rel=1e-6)
    error = (_dequantized(content, scale, (7, 64), "fp8") - tokens).abs()
    bound = torch.maximum(tokens.abs() / 16, torch.tensor(scale / 1024))
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 4).any()  # the bound is not an idle one


def test_bf16_rounds_to_bfloat16() -> None:
    tokens = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    content, scale = quantize(tokens, "bf16")
    assert scale == 1.0 and len(content) == 2 * tokens.numel()
    assert torch.equal(_dequantized(content, scale, (3, 16), "bf16"), tokens.bfloat16().float())


def test_numbers_that_fp8_holds_survive_exactly() -> None:
    tokens = torch.tensor([[448.0, -1.5, 0.0, 0.25]])
    for numbers in (tokens, torch.zeros(2, 4), torch.zeros(0, 4)):
        read = _dequantized(*quantize(numbers, "fp8"), numbers.shape, "fp8")
        assert torch.equal(read, numbers)


def test_every_fp8_number_is_read_as_torch_converts_it() -> None:
    """Of many pieces, the last one cut short."""
    numbers = torch.arange(256, dtype=torch.uint8).repeat(400)
    read = _dequantized(numbers.numpy().tobytes(), 0.7, (400, 256), "fp8")
    expected = numbers.view(torch.float8_e4m3fn).float().mul(0.7).view(400, 256)
    torch.testing.assert_close(read, expected, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------- layout


def test_row_groups_end_at_buckets_and_shards() -> None:
    prompts = [Prompt(str(i), 64 if i in (0, 5, 6) else 32, 32) for i in range(12)]
    buckets, shards = plan_store(prompts, rows_per_shard=7, rows_per_group=2)
    assert [(b.height, b.rows) for b in buckets] == [(64, 3), (32, 9)]
    texts = [prompt.text for shard in shards for prompt in shard.prompts]
    assert texts == ["0", "5", "6", "1", "2", "3", "4", "7", "8", "9", "10", "11"]
    groups = [[(g.rows, g.bucket) for g in shard.row_groups] for shard in shards]
    assert groups == [[(2, 0), (1, 0), (2, 1), (2, 1)], [(2, 1), (2, 1), (1, 1)]]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_rows_come_back_in_the_order_asked_for(make_store: MakeStore, dtype: str) -> None:
    store = make_store({(32, 32): 13, (64, 32): 10}, dtype=dtype)
    store.verify()
    rows = [22, 0, 13, 12, 0, 7]
    batch = store.read(rows)
    prompts = [(f"prompt {r}", 32, 32) if r < 13 else (f"prompt {r - 13}", 64, 32) for r in rows]
    assert list(zip(batch.prompts, batch.heights, batch.widths, strict=True)) == prompts
    assert batch.tokens.shape == (6, 5, 8) and batch.pooled.shape == (6, 6)
    for row, prompt in enumerate(prompts):
        expected = _value(*prompt)
        count = int(batch.num_tokens[row])
        assert count == len(expected) and (batch.tokens[row, count:] == 0).all()
        tolerance = 2**-8 if dtype == "bf16" else 2**-4
        torch.testing.assert_close(batch.tokens[row, :count], expected, rtol=tolerance, atol=0.01)
        assert batch.prompt_ids[row] == Prompt(*prompt).prompt_id


def test_row_groups_on_disk_are_the_manifests(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 13, (64, 32): 10})
    for shard in store.manifest.shards:
        metadata = pq.ParquetFile(Path(store.uri) / shard.path).metadata
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        assert rows == [group.rows for group in shard.row_groups]


def test_a_small_cache_changes_nothing(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 25})
    rows = np.random.default_rng(0).permutation(25)
    assert RowReader(store, kept_groups=1).rows(rows).equals(RowReader(store).rows(rows))


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_are_cut_out_of_row_groups_as_pyarrow_takes_them(
    make_store: MakeStore, pooled: bool
) -> None:
    store = make_store({(32, 32): 25, (64, 32): 10}, pooled=pooled)
    files = [pq.read_table(Path(store.uri) / shard.path) for shard in store.manifest.shards]
    whole = pa.concat_tables(files).replace_schema_metadata(None).combine_chunks()
    rows = np.random.default_rng(0).integers(0, 35, 60)
    found = RowReader(store).rows(rows).replace_schema_metadata(None)
    found.validate(full=True)
    assert found.equals(whole.take(pa.array(rows)))
    assert found.slice(20, 7).equals(whole.take(pa.array(rows[20:27])))


def test_writing_is_deterministic(make_store: MakeStore) -> None:
    first, second = make_store({(8, 8): 25}, name="a"), make_store({(8, 8): 25}, name="b")
    assert first.manifest == second.manifest
    assert first.manifest_hash == second.manifest_hash
    assert make_store({(8, 8): 24}, name="c").manifest_hash != first.manifest_hash


def test_first_by_hash_takes_the_smallest_ids(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 25})
    ids = sorted(Prompt(f"prompt {i}", 32, 32).prompt_id for i in range(25))
    assert list(store.first_by_hash(5).prompt_ids) == ids[:5]
    with pytest.raises(ValueError, match="26 prompts were asked .* holds 25"):
        store.first_by_hash(26)


def test_the_empty_prompt_is_apart(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 5})
    assert store.empty_prompt().prompts == ("",)
    assert "" not in store.index()["prompt"].to_pylist()
    assert store.manifest.num_rows == 5


def test_encoders_without_a_pooled_vector(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 12}, pooled=False)
    store.verify()
    batch = store.read([3, 11])
    assert batch.pooled is None and store.empty_prompt().pooled is None
    assert torch.equal(batch.tokens, make_store({(32, 32): 12}, name="b").read([3, 11]).tokens)


# ------------------------------------------------------------------------------- negative prompts


def test_a_negative_prompt_comes_back_as_the_encoder_gave_it(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 5}, negative_prompts=["blurry", " "])
    store.verify()
    for text in ("blurry", " "):
        found = store.negative_prompt(text)
        expected = _value(text, 0, 0)
        count = int(found.num_tokens[0])
        assert found.prompts == (text,) and count == len(expected)
        torch.testing.assert_close(found.tokens[0, :count], expected, rtol=2**-8, atol=0.01)
    assert store.manifest.num_rows == 5
    assert not {"blurry", " "} & set(store.index()["prompt"].to_pylist())


def test_no_negative_prompt_is_the_empty_prompt(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 5})
    found, empty = store.negative_prompt(""), store.empty_prompt()
    assert torch.equal(found.tokens, empty.tokens) and found.prompts == ("",)


def test_a_missing_negative_prompt_says_how_to_add_it(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 5}, negative_prompts=["blurry"])
    store.require_negative_prompt("blurry")
    store.require_negative_prompt("")
    expected = "lacks the recipe's guidance.negative_prompt 'ugly'; run `piflow embed`"
    with pytest.raises(StoreError, match=expected):
        store.require_negative_prompt("ugly")
    with pytest.raises(StoreError, match=expected):
        store.negative_prompt("ugly")


def test_negative_prompts_do_not_change_what_a_run_trains_on(make_store: MakeStore) -> None:
    without = make_store({(32, 32): 5}, name="a").manifest
    with_one = make_store({(32, 32): 5}, name="b", negative_prompts=["blurry"]).manifest
    assert with_one.manifest_hash == without.manifest_hash
    assert with_one.inputs.digest == without.inputs.digest
    assert len(with_one.files) == len(without.files) + 1


def test_damage_to_a_negative_prompt_is_found(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 5}, negative_prompts=["blurry"])
    path = Path(store.uri) / store.manifest.negative_prompts[0].path
    column = pq.ParquetFile(path).metadata.row_group(0).column(6)
    _damage(path, column.data_page_offset + column.total_compressed_size - 5)
    with pytest.raises(StoreError, match=r"negative-prompt-.* is corrupt \(row group 0\): sha256"):
        store.verify()
    path.unlink()
    with pytest.raises(StoreError, match="lacks negative-prompt-"):
        EmbeddingStore.open(store.uri)


# ------------------------------------------------------------------------------------- what's wrong


def test_a_missing_manifest_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="manifest.json is missing; make it with `piflow embed`"):
        EmbeddingStore.open(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"inputs": {"schema_version": 2}, "extra": 1}']
)
def test_a_corrupt_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match="manifest.json .* is corrupt"):
        read_manifest(str(tmp_path))


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"inputs": {"schema_version": 99}}))
    with pytest.raises(
        StoreError, match="format version 99, this piflow reads 2, 3, 4 and 5; remove"
    ):
        read_manifest(str(tmp_path))


def test_a_missing_or_shortened_file_is_named(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 25})
    path = Path(store.uri) / "shard-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(
        StoreError, match=f"shard-00001.parquet .* {size - 1} bytes, the manifest says {size}"
    ):
        EmbeddingStore.open(store.uri)
    path.unlink()
    with pytest.raises(StoreError, match="lacks shard-00001.parquet; run `piflow embed` again"):
        EmbeddingStore.open(store.uri)


def test_a_flipped_byte_is_found_when_its_row_group_is_read(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 25})
    path = Path(store.uri) / "shard-00001.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(6)
    assert column.path_in_schema == "tokens"
    _damage(path, column.data_page_offset + column.total_compressed_size - 5)
    opened = EmbeddingStore.open(store.uri)  # the size is right
    opened.read(range(14))  # other row groups can still be read
    with pytest.raises(StoreError, match="row group 1 of shard-00001.parquet"):
        opened.read([14])
    with pytest.raises(
        StoreError, match=r"shard-00001.parquet .* is corrupt \(row group 1\): sha256"
    ):
        opened.verify()


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(make_store: MakeStore) -> None:
    """Its footer is kept from the first look: rows of another store came as if they were its."""
    store = make_store({(32, 32): 25})
    path = Path(store.uri) / "shard-00001.parquet"
    reader = RowReader(store, kept_groups=1)
    first = reader.rows(np.array([11]))
    content = path.read_bytes()
    path.write_bytes(content)  # the same once more
    os.utime(path, ns=(1, 1))
    assert reader.rows(np.array([15]))["prompt"].to_pylist() == ["prompt 15"]
    table = pq.ParquetFile(path).read()
    column = next(n for n, name in enumerate(table.column_names) if name == "scale")
    changed = table.set_column(column, SCHEMA.field("scale"), pa.array([2.0] * 10, pa.float32()))
    pq.write_table(changed, path, row_group_size=4, use_dictionary=False)
    with pytest.raises(DamageError, match="shard-00001.parquet .*replaced while it was in use"):
        reader.rows(np.array([11]))
    path.write_bytes(content)
    assert reader.rows(np.array([11])).equals(first), "put right again"


def test_a_store_of_other_prompts_than_the_recipes_is_refused(
    tmp_path: Path, make_store: MakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store({(32, 32): 5})
    file = tmp_path / "prompts.txt"
    recipe = parse_recipe(
        {
            "name": "others", "run_dir": "run", "model": {"path": "unused"},
            "encoder": {"path": "unused"},
            "embed": {
                "prompts": str(file), "store": store.uri, "height": 32, "width": 32,
                "rows_per_shard": 10, "rows_per_group": 4, "dtype": "bf16",
            },
        }
    )  # fmt: skip
    require_recipes_prompts(recipe, store.uri, store.manifest.inputs)
    assert "are not there to be compared" in capsys.readouterr().out
    file.write_text("".join(f"prompt {n}\n" for n in range(5)))
    require_recipes_prompts(recipe, store.uri, store.manifest.inputs)
    assert capsys.readouterr().out == ""
    file.write_text("".join(f"prompt {n}\n" for n in (0, 1, 2, 4, 3)))  # in another order
    with pytest.raises(StoreError, match="of other inputs .prompts_sha256: .* in the recipe"):
        require_recipes_prompts(recipe, store.uri, store.manifest.inputs)
    file.write_text("".join(f"prompt {n}\n" for n in range(6)))
    with pytest.raises(StoreError, match="num_prompts: 5 there, 6 in the recipe"):
        require_recipes_prompts(recipe, store.uri, store.manifest.inputs)


def test_another_encoders_store_is_refused(make_store: MakeStore) -> None:
    store = make_store({(32, 32): 5})
    store.require_encoder(store.manifest.encoder)
    other = EncoderIdentity(name="big", weights_sha256="cd" * 32, max_tokens=5, hidden_size=8)
    with pytest.raises(StoreError, match="built for another encoder: it holds test-2x8 .* big "):
        store.require_encoder(other)


def test_other_inputs_are_named(make_store: MakeStore) -> None:
    inputs = make_store({(32, 32): 5}).manifest.inputs
    require_same_inputs("x", inputs, inputs)
    changed = inputs.model_copy(update={"rows_per_group": 3, "dtype": "fp8"})
    with pytest.raises(StoreError, match="dtype: fp8 there, bf16 in .*rows_per_group: 3 there, 4"):
        require_same_inputs("x", changed, inputs)


def test_non_finite_embeddings_are_refused_by_prompt(tmp_path: Path, make_store: MakeStore) -> None:
    inputs = make_store({(32, 32): 2}).manifest.inputs
    _, [plan] = plan_store([Prompt("fine", 8, 8), Prompt("bad one", 8, 8)], 10, 10)
    good = EncodedPrompt(torch.ones(1, 8), torch.ones(6), False)
    bad = EncodedPrompt(torch.full((1, 8), torch.nan), torch.ones(6), False)
    with pytest.raises(ValueError, match="non-finite numbers for prompt 'bad one'"):
        write_shard(str(tmp_path / "new"), plan, [good, bad], inputs)
    bare = EncodedPrompt(torch.ones(1, 8), None, False)
    with pytest.raises(ValueError, match="1 of 2 embeddings have a pooled vector"):
        write_shard(str(tmp_path / "new"), plan, [good, bare], inputs)
    with pytest.raises(ValueError, match="expects 2 embeddings, got 1"):
        write_shard(str(tmp_path / "new"), plan, [good], inputs)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------ reuse


BUCKETS = (Bucket(height=8, width=8, rows=6),)


@pytest.fixture
def shard(tmp_path: Path, make_store: MakeStore) -> tuple[str, ShardPlan, StoreInputs]:
    inputs = make_store({(32, 32): 2}).manifest.inputs
    _, [plan] = plan_store([Prompt(f"p{i}", 8, 8) for i in range(6)], 10, 4)
    uri = str(tmp_path / "reuse")
    encoded = [EncodedPrompt(torch.ones(2, 8), torch.ones(6), i > 3) for i in range(6)]
    write_shard(uri, plan, encoded, inputs)
    return uri, plan, inputs


def test_a_whole_shard_is_reused_with_what_was_known_of_it(
    shard: tuple[str, ShardPlan, StoreInputs],
) -> None:
    uri, plan, inputs = shard
    entry, report = reusable_shard(uri, plan, inputs, BUCKETS) or pytest.fail("not reused")
    encoded = [EncodedPrompt(torch.ones(2, 8), torch.ones(6), i > 3) for i in range(6)]
    assert (entry, report) == write_shard(uri, plan, encoded, inputs)
    assert report.truncated == 2 and report.examples == ("p4", "p5")


def test_other_inputs_prompts_or_damage_forbid_reuse(
    shard: tuple[str, ShardPlan, StoreInputs],
) -> None:
    uri, plan, inputs = shard
    assert reusable_shard(uri, plan, inputs.model_copy(update={"num_prompts": 99}), BUCKETS) is None
    swapped = ShardPlan(plan.path, plan.prompts[::-1], plan.row_groups)
    assert reusable_shard(uri, swapped, inputs, BUCKETS) is None
    path = Path(uri) / plan.path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert reusable_shard(uri, plan, inputs, BUCKETS) is None
    path.write_bytes(whole)
    column = pq.ParquetFile(path).metadata.row_group(0).column(6)
    _damage(path, column.data_page_offset + column.total_compressed_size - 1)
    assert reusable_shard(uri, plan, inputs, BUCKETS) is None


def test_a_reading_process_imports_no_torch() -> None:
    """In a fresh interpreter: the import would be most of the time until the first batch."""
    program = (
        "import sys\n"
        "import piflow.data.ray_reader\n"
        "print([m for m in ('torch', 'transformers', 'diffusers', 'ray') if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
