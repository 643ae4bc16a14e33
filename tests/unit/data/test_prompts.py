from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from piflow.data.prompts import Prompt, PromptSet, read_prompts


def _read(path: Path, column: str = "prompt") -> PromptSet:
    return read_prompts(str(path), column=column, height=32, width=48)


def _write(path: Path, texts: list[str], column: str) -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"n": 1, column: text}) + "\n" for text in texts))
    elif path.suffix == ".csv":
        path.write_text(f"n,{column}\n" + "".join(f'1,"{text}"\n' for text in texts))
    else:
        pq.write_table(pa.table({"n": [1] * len(texts), column: texts}), path)
    return path


FORMATS = [".txt", ".jsonl", ".csv", ".parquet"]
COLUMN_FORMATS = FORMATS[1:]


@pytest.mark.parametrize("ending", FORMATS)
def test_formats_agree_keep_order_and_drop_repeats(tmp_path: Path, ending: str) -> None:
    texts = ["red heart", "cat, sitting", " red heart ", "été", "cat, sitting"]
    prompts = _read(_write(tmp_path / f"p{ending}", texts, "caption"), "caption")
    assert [p.text for p in prompts.prompts] == ["red heart", "cat, sitting", "été"]
    assert {(p.height, p.width) for p in prompts.prompts} == {(32, 48)}
    assert prompts.duplicates == 2


@pytest.mark.parametrize(
    ("ending", "place"),
    [(".txt", "line 2"), (".jsonl", "line 2"), (".csv", "line 3"), (".parquet", "row 2")],
)
def test_a_blank_prompt_is_refused_with_its_place(tmp_path: Path, ending: str, place: str) -> None:
    path = _write(tmp_path / f"p{ending}", ["a", "  ", "b"], "prompt")
    with pytest.raises(ValueError, match=f"p{ending}, {place}: the prompt is blank"):
        _read(path)


@pytest.mark.parametrize("ending", COLUMN_FORMATS)
def test_a_missing_column_names_those_there(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path / f"p{ending}", ["a"], "caption")
    with pytest.raises(ValueError, match="no column 'prompt'; available: n, caption"):
        _read(path)


@pytest.mark.parametrize("ending", COLUMN_FORMATS)
def test_size_columns_override_the_given_size(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p{ending}"
    if ending == ".jsonl":
        path.write_text('{"prompt": "a", "height": 64, "width": 16}\n{"prompt": "a"}\n')
    elif ending == ".csv":
        path.write_text("prompt,height,width\na,64,16\na,,\n")
    else:
        sizes = {"height": [64, None], "width": [16, None]}
        pq.write_table(pa.table({"prompt": ["a", "a"], **sizes}), path)
    assert _read(path).prompts == (Prompt("a", 64, 16), Prompt("a", 32, 48))


def test_the_id_is_a_hash_of_size_and_text() -> None:
    expected = hashlib.sha256(b"32x48\nred heart").hexdigest()[:16]
    assert Prompt("red heart", 32, 48).prompt_id == expected
    others = [Prompt("red heart", 48, 32), Prompt("red hearts", 32, 48)]
    assert expected not in [other.prompt_id for other in others]


def test_the_digest_follows_content_and_order() -> None:
    a, b = Prompt("a", 1, 1), Prompt("b", 1, 1)
    assert PromptSet((a, b), 0).digest == PromptSet((a, b), 5).digest
    assert len({PromptSet(p, 0).digest for p in [(a, b), (b, a), (a,), (b,)]}) == 4


def test_windows_line_ends_and_byte_order_marks_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffred heart\r\ncat".encode())
    assert [p.text for p in _read(path).prompts] == ["red heart", "cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.yaml", b"a", "ending '.yaml'; supported: .txt, .jsonl, .csv, .parquet"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not valid JSON"),
        ("p.jsonl", b'["a"]\n', "line 1: expected an object"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: the prompt must be a text, got 3"),
        ("p.jsonl", b'{"prompt": "a", "height": -1}\n', "height must be a positive number.*-1"),
        ("p.csv", b"prompt\na,b\n", "line 2: more fields"),
        ("p.csv", b"prompt,width\na,wide\n", "line 2: width must be .* got 'wide'"),
        ("p.parquet", b"PAR1 no", "not readable Parquet"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        _read(tmp_path / "absent.txt")
