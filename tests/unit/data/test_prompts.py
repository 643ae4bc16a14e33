from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from piflow.config import EmbedConfig
from piflow.data.prompts import (
    FORMATS,
    Prompt,
    PromptSet,
    choose_bucket,
    prompt_files,
    read_prompts,
)
from piflow.storage.places import NamedPlaces

COLUMN_FORMATS = [ending for ending in FORMATS if not ending.startswith(".txt")]
BUCKETS = [[64, 16], [32, 32], [16, 64]]
OWN_SIZES = {"height_column": "h", "width_column": "w"}


def _read(path: Path | str, column: str = "prompt", **settings: Any) -> PromptSet:
    return read_prompts(str(path), column=column, height=32, width=48, **settings)


def _texts(prompts: PromptSet) -> list[str]:
    return [prompt.text for prompt in prompts.prompts]


def _save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _write(path: Path, texts: list[str], column: str = "prompt", **more: list[Any]) -> Path:
    """A file of any format with columns n, `column` and more."""
    columns = {"n": [1] * len(texts), column: texts, **more}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=1 + len(texts) // 2)
        return path
    if ending == "txt":
        lines = texts
    elif ending == "jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        cells = [["" if cell is None else f'"{cell}"' for cell in row.values()] for row in rows]
        lines = [",".join(columns), *(",".join(row) for row in cells)]
    return _save(path, "".join(f"{line}\n" for line in lines).encode())


# ------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("ending", FORMATS)
def test_formats_agree_keep_order_and_drop_repeats(tmp_path: Path, ending: str) -> None:
    texts = ["red heart", "cat, sitting", " red heart ", "été", "cat, sitting"]
    prompts = _read(_write(tmp_path / f"p{ending}", texts, "caption"), "caption")
    assert _texts(prompts) == ["red heart", "cat, sitting", "été"]
    assert {(p.height, p.width) for p in prompts.prompts} == {(32, 48)}
    assert prompts.duplicates == 2


@pytest.mark.parametrize("blank", ["  ", ""])
@pytest.mark.parametrize("ending", FORMATS)
def test_a_blank_prompt_is_refused_with_its_place(tmp_path: Path, ending: str, blank: str) -> None:
    place = {".csv": "line 4", ".parquet": "row 3"}.get(ending.removesuffix(".gz"), "line 3")
    path = _write(tmp_path / f"p{ending}", ["a", "b", blank, "c"])
    with pytest.raises(ValueError, match=f"p{ending}, {place}: the prompt is blank"):
        _read(path)


def test_rows_are_counted_through_a_large_parquet_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.parquet", ["a"] * 5000 + [" "])
    with pytest.raises(ValueError, match="row 5001: the prompt is blank"):
        _read(path)


@pytest.mark.parametrize("ending", COLUMN_FORMATS)
def test_a_missing_column_names_those_there(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path / f"p{ending}", ["a"], "caption")
    with pytest.raises(ValueError, match="no column 'prompt'; available: n, caption"):
        _read(path)


def test_texts_may_span_lines_and_the_place_is_their_first_line(tmp_path: Path) -> None:
    path = _save(tmp_path / "p.csv", b'prompt,n\n"two\nlines",1\n\n"  \n",2\n')
    with pytest.raises(ValueError, match="line 5: the prompt is blank"):
        _read(path)
    _save(path, b'prompt,n\n"two\r\nlines",1\n\nshort\n')
    assert _texts(_read(path)) == ["two\r\nlines", "short"]


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("ending", COLUMN_FORMATS)
def test_size_columns_come_before_the_default(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p{ending}"
    _write(path, ["a", "a", "a"], h=[64, None, 64], w=[16, None, 16])
    prompts = _read(path, **OWN_SIZES)
    assert prompts.prompts == (Prompt("a", 64, 16), Prompt("a", 32, 48))
    assert prompts.duplicates == 1
    assert _read(path).prompts == (Prompt("a", 32, 48),)  # only where the recipe names them


def test_size_columns_come_before_buckets(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(50)]
    own = [8 if number % 2 else None for number in range(50)]
    path = _write(tmp_path / "p.parquet", texts, h=own, w=own)
    prompts = _read(path, **OWN_SIZES, buckets=BUCKETS, seed=1).prompts
    assert {(p.height, p.width) for p in prompts[1::2]} == {(8, 8)}
    assert [(p.height, p.width) for p in prompts[::2]] == [
        choose_bucket(text, BUCKETS, 1) for text in texts[::2]
    ]


def test_a_bucket_depends_on_text_and_seed_but_not_on_order_or_neighbours(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(60)]
    forward = _read(_write(tmp_path / "p.txt", texts), buckets=BUCKETS)
    other = _write(tmp_path / "q.jsonl.gz", [*texts[40::-1], texts[3]])
    backward = _read(other, buckets=BUCKETS)
    assert set(backward.prompts) == set(forward.prompts[:41])
    assert backward.duplicates == 1
    assert set(_read(other, buckets=BUCKETS, seed=1).prompts) != set(backward.prompts)


def test_the_choice_of_buckets_is_even_and_fixed_for_all_times() -> None:
    """Stores and runs lean on it: a changed choice makes finished stores unusable."""
    chosen = [choose_bucket(f"prompt {number}", BUCKETS, 7) for number in range(3000)]
    assert chosen[:4] == [(32, 32), (16, 64), (64, 16), (64, 16)]
    counts = Counter(chosen)
    assert len(counts) == 3 and all(900 < count < 1100 for count in counts.values())
    twice = Counter(choose_bucket(str(n), [[1, 1], [2, 2], [2, 2]], 0) for n in range(3000))
    assert 1850 < twice[2, 2] < 2150


@pytest.mark.parametrize("ending", COLUMN_FORMATS)
def test_size_columns_must_be_there(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path / f"p{ending}", ["a", "b"], height=[8, 8], width=[8, 8])
    with pytest.raises(
        ValueError, match=r"(no column 'h'; available: n, |no line has h or w).*width"
    ):
        _read(path, **OWN_SIZES)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        ("8", "null", "line 1: height is 8 and width None; give both"),
        ("-1", "8", "line 1: height must be a positive whole number of pixels, got -1"),
        ("8", "8.5", "line 1: width must be .* got 8.5"),
        ("8", '"wide"', "line 1: width must be .* got 'wide'"),
        ("true", "8", "line 1: height must be .* got True"),
    ],
)
def test_unusable_sizes_are_refused(tmp_path: Path, height: str, width: str, message: str) -> None:
    line = f'{{"prompt": "a", "h": {height}, "w": {width}}}'
    path = _save(tmp_path / "p.jsonl", line.encode())
    with pytest.raises(ValueError, match=message):
        _read(path, **OWN_SIZES)


def test_a_size_needs_both_columns(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.txt", ["a"])
    with pytest.raises(ValueError, match="height_column is 'h', width_column is None"):
        _read(path, height_column="h")
    with pytest.raises(ValueError, match="has no columns, but embed.height_column is 'h'"):
        _read(path, **OWN_SIZES)
    embed = {"prompts": "p", "store": "s", "height": 8, "width": 8}
    assert EmbedConfig(**embed, buckets=BUCKETS, **OWN_SIZES).buckets == BUCKETS
    with pytest.raises(ValidationError, match="height_column is None and width_column is 'w'"):
        EmbedConfig(**embed, width_column="w")
    with pytest.raises(ValidationError, match="buckets.0"):
        EmbedConfig(**embed, buckets=[[8]])


# ------------------------------------------------------------------------------------- many files


def test_a_pattern_reads_its_files_in_order_of_their_names(tmp_path: Path) -> None:
    _write(tmp_path / "part-2.jsonl.gz", ["c", "a"])
    _write(tmp_path / "part-1.jsonl.gz", ["a", "b"])
    _write(tmp_path / "part-0.jsonl.gz", [])
    _write(tmp_path / "other.jsonl.gz", ["d"])
    prompts = _read(f"{tmp_path}/part-*.jsonl.gz")
    assert _texts(prompts) == ["a", "b", "c"]
    assert prompts.duplicates == 1
    assert prompts.digest == _read(_write(tmp_path / "one.csv", ["a", "b", "c"])).digest


def test_errors_name_the_file_of_a_pattern(tmp_path: Path) -> None:
    _write(tmp_path / "a.txt", ["x"])
    _write(tmp_path / "b.txt", ["x", " "])
    with pytest.raises(ValueError, match="b.txt, line 2: the prompt is blank"):
        _read(f"{tmp_path}/*.txt")
    _save(tmp_path / "c.yaml", b"")
    with pytest.raises(ValueError, match="c.yaml has ending '.yaml'; supported: .txt, .txt.gz, "):
        _read(f"{tmp_path}/*")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        _read(f"{tmp_path}/*.csv")


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["b.parquet", "a.parquet", "README.md", ".c.parquet"], ["a.parquet", "b.parquet"]),
        (["data/b.csv", "data/a.csv.gz"], ["data/a.csv.gz", "data/b.csv"]),
        (["train.jsonl", "test.jsonl", "more.jsonl"], ["train.jsonl"]),
        (
            [
                "data/train-00001-of-00002.parquet",
                "data/train-00000-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
                "data/validation_x.csv",
            ],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["b.csv", "data/a.csv", "z.csv"], ["b.csv", "data/a.csv", "z.csv"]),
        (["train/0000.parquet", "test/0000.parquet"], ["train/0000.parquet"]),
        (["data/train/x.jsonl.gz", "data/dev/x.jsonl.gz"], ["data/train/x.jsonl.gz"]),
        (["trained.csv", "latest.csv"], ["latest.csv", "trained.csv"]),  # words, not parts of them
    ],
)
def test_a_dataset_folder_stands_for_its_train_split(
    tmp_path: Path, files: list[str], chosen: list[str]
) -> None:
    folder = tmp_path / "test"  # the folder's own name says nothing
    for name in files:
        _save(folder / name, b"")
    assert prompt_files(str(folder)) == [f"{folder}/{name}" for name in chosen]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no .jsonl, .jsonl.gz, .csv, .csv.gz, .parquet file in itself, data, train, "),
        (["a.txt", "deep/down/a.csv"], "has no .* by a pattern such as .*/[*][*]/[*].parquet"),
        (["eval.csv", "dev.csv"], "no train split, but test, validation; .*[*]test[*]"),
        (["a.csv", "b.parquet"], r"in several formats \(.csv, .parquet\).*such as [*].csv"),
    ],
)
def test_unclear_dataset_folders_are_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        _save(tmp_path / name, b"")
    with pytest.raises(ValueError, match=message):
        prompt_files(str(tmp_path))


def test_a_dataset_folder_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train-1.parquet", ["c", "b"], "caption")
    _write(tmp_path / "data" / "train-0.parquet", ["a", "b"], "caption")
    assert _texts(_read(tmp_path, "caption")) == ["a", "b", "c"]


# --------------------------------------------------------------------------------- identity, size


def test_the_id_is_a_hash_of_size_and_text() -> None:
    expected = hashlib.sha256(b"32x48\nred heart").hexdigest()[:16]
    assert Prompt("red heart", 32, 48).prompt_id == expected
    others = [Prompt("red heart", 48, 32), Prompt("red hearts", 32, 48)]
    assert expected not in [other.prompt_id for other in others]


def test_prompts_travel_to_other_processes() -> None:
    prompt = Prompt("red heart", 32, 48)
    assert pickle.loads(pickle.dumps(prompt)) == prompt


def test_the_digest_follows_content_and_order() -> None:
    a, b = Prompt("a", 1, 1), Prompt("b", 1, 1)
    assert PromptSet((a, b), 0).digest == PromptSet((a, b), 5).digest
    assert len({PromptSet(p, 0).digest for p in [(a, b), (b, a), (a,), (b,)]}) == 4


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl", ".csv", ".parquet"])
def test_repeated_prompts_take_no_memory(tmp_path: Path, ending: str) -> None:
    """What is kept is the distinct prompts: neither the file nor its rows."""
    text, count = "x" * 2000, 20_000
    path = _write(tmp_path / f"p{ending}", [text] * count)
    tracemalloc.start()
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        prompts = _read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        pa.set_memory_pool(before)
        tracemalloc.stop()
    assert prompts.duplicates == count - 1
    assert peak + pool.max_memory() < len(text) * count / 2


# ---------------------------------------------------------------------------------------- content


def test_windows_line_ends_and_byte_order_marks_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffred heart\r\ncat".encode())
    assert _texts(_read(path)) == ["red heart", "cat"]
    path = _save(tmp_path / "p.csv.gz", "\ufeffprompt,n\r\nred heart,1\r\ncat,2\r\n".encode())
    assert _texts(_read(path)) == ["red heart", "cat"]


def test_gzip_files_may_be_joined(tmp_path: Path) -> None:
    path = tmp_path / "p.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n"))
    assert _texts(_read(path)) == ["a", "bc", "d"]


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"a\nb\n")
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the checksum's
    path = tmp_path / "p.txt.gz"
    for content in (whole[:-9], bytes(flipped), b"a\nb\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"p.txt.gz, after line \d: not valid gzip"):
            _read(path)


def test_a_parquet_text_that_is_not_utf8_is_refused_with_its_row(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff\xfe"))
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet, row 2: not UTF-8"):
        _read(tmp_path / "p.parquet")


def test_parquet_texts_of_any_string_type(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = tmp_path / "p.parquet"
        pq.write_table(pa.table({"prompt": pa.array(["a", "b", "a"]).cast(kind)}), path)
        assert _texts(_read(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"a\n\xff\xfe", "line 2: not UTF-8"),
        ("p.yaml", b"a", "ending '.yaml'; supported: .txt, .txt.gz, .jsonl, "),
        ("p.gz", b"a", "ending '.gz'; supported"),
        ("p.parquet.gz", b"a", "ending '.parquet.gz'; supported"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 isn't JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n', "line 2 isn't JSON"),
        ("p.jsonl", b'["a"]\n', "line 1: expected an object"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: the prompt must be a text, got 3"),
        ("p.jsonl", b'{"prompt": null}\n', "line 1: the prompt is blank"),
        ("p.jsonl.gz", b'{"prompt": "\\ud83d!"}\n', "line 1: the prompt .* is not valid Unicode"),
        ("p.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1 isn't JSON"),
        ("p.csv", b"prompt\na,b\n", "line 2: more fields"),
        ("p.csv", b'prompt,n\na,1\n"b,2\n', "line 3: unexpected end of data"),
        ("p.csv.gz", b"", "no column 'prompt'; available: none"),
        ("p.parquet", b"PAR1 no", "not readable Parquet"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = _save(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        _read(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3], "row 1: the prompt must be a text, got 3"),
        ([b"a"], "row 1: the prompt must be a text, got b'a'"),
        ([["a"]], "column 'prompt' holds list"),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(
    tmp_path: Path, values: list[Any], message: str
) -> None:
    pq.write_table(pa.table({"prompt": values}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=f"p.parquet.*{message}"):
        _read(tmp_path / "p.parquet")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        _read(tmp_path / "absent.txt")


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("ending", COLUMN_FORMATS)
def test_pictures_are_named_from_the_prompts_files_folder(tmp_path: Path, ending: str) -> None:
    images = ["pictures/a.png", "/data/b.png", "s3://bucket/c.png", "", "pictures/a.png"]
    path = _write(tmp_path / f"p{ending}", ["x", "x", "x", "x", "x"], image=images)
    found = _read(path, image_column="image", allow_uris=["/data", "s3://bucket"])
    assert found.duplicates == 1
    pictures = [prompt.picture for prompt in found.prompts]
    assert [(p.key, p.uri) for p in pictures if p is not None] == [
        ("pictures/a.png", f"{tmp_path}/pictures/a.png"),
        ("/data/b.png", "/data/b.png"),
        ("s3://bucket/c.png", "s3://bucket/c.png"),
        ("", ""),
    ]
    assert len({prompt.prompt_id for prompt in found.prompts}) == 4
    assert _read(path).duplicates == 4  # only where the recipe names the column


def test_the_same_name_in_two_folders_is_two_pictures(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        _write(tmp_path / folder / "p.jsonl", ["x"], image=["a.png"])
    found = _read(f"{tmp_path}/*/p.jsonl", image_column="image").prompts
    assert [p.picture.key for p in found if p.picture is not None] == ["one/a.png", "two/a.png"]
    moved = (tmp_path / "one").rename(tmp_path / "three")
    alone = _read(moved / "p.jsonl", image_column="image").prompts[0]
    assert alone.picture is not None and alone.picture.key == "a.png"


def test_pictures_lie_beside_prompts_on_s3_and_the_hub() -> None:
    """An S3 URI keeps its query, and what means something in it is quoted."""
    uri = "s3://bucket/data/p.jsonl?region=eu"
    found = NamedPlaces(uri).resolve("a b/c#d.png")
    assert found == "s3://bucket/data/a%20b/c%23d.png?region=eu"
    assert NamedPlaces(uri).resolve("../e.png") == "s3://bucket/e.png?region=eu"
    hub = NamedPlaces("hf://datasets/owner/name@v1/data/p.jsonl")
    assert hub.resolve("a b/c#d.png") == "hf://datasets/owner/name@v1/data/a b/c#d.png"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("p.txt", "has no columns, but embed.image_column is 'image'"),
        ("p.jsonl", "no line has image; check embed.image_column"),
        ("p.csv", "no column 'image'; available: n, prompt; set embed.image_column"),
        ("p.parquet", "no column 'image'; available: n, prompt; set embed.image_column"),
    ],
)
def test_a_missing_image_column_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(_write(tmp_path / name, ["x"]), image_column="image")


def test_a_picture_of_another_type_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "p.jsonl", b'{"prompt": "x", "image": 7}\n')
    with pytest.raises(ValueError, match="line 1: the picture must be a path, a URI or bytes"):
        _read(path, image_column="image")
