"""Sets of prompts in the layouts that people publish them in, and what is refused of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from piflow.config import EvaluationConfig, PromptSetConfig, parse_recipe
from piflow.data import prompt_set
from piflow.data.prompt_set import read_prompt_set, set_recipe
from piflow.data.prompts import Prompt, PromptSet, read_prompts

TEXTS = ["a red heart", "two cats", "a blue, round door"]


def written(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return str(path)


def read(path: str, count: int = 3, **keys: Any) -> tuple[list[str], list[str] | None]:
    found = read_prompt_set(PromptSetConfig(path=path, **keys), count)
    return list(found.prompts), None if found.categories is None else list(found.categories)


def test_every_layout(tmp_path: Path) -> None:
    """HPSv2's lists, COCO's captions, tables; each text once, in the order of the file."""
    lines = "\n".join(json.dumps({"prompt": text, "kind": text[0]}) for text in TEXTS)
    table = 'prompt,kind\na red heart,a\ntwo cats,t\n"a blue, round door",a\n'
    captions = [
        {"id": 7, "image_id": 1, "caption": "a red heart"},
        {"id": 8, "image_id": 1, "caption": "a heart, once more"},
        {"id": 9, "image_id": 2, "caption": "two cats\n"},
        {"id": 10, "image_id": 3, "caption": "a blue, round door"},
    ]
    plain = [
        written(tmp_path, "a.json", json.dumps([*TEXTS, TEXTS[0]])),
        written(tmp_path, "b.json", json.dumps({"annotations": captions, "images": []})),
        written(tmp_path, "c.txt", "\n".join(TEXTS)),
        written(tmp_path, "d.txt.gz", "\n".join(TEXTS)),
        written(tmp_path, "e.csv", table),
        written(tmp_path, "f.jsonl", lines),
        written(tmp_path, "g.json", json.dumps([{"prompt": text} for text in TEXTS])),
    ]
    for path in plain:
        assert read(path) == (TEXTS, None), path
    assert read(plain[4], category_column="kind") == (TEXTS, ["a", "t", "a"])
    assert read(plain[5], category_column="kind") == (TEXTS, ["a", "t", "a"])
    by_kind = written(tmp_path, "h.json", json.dumps({"anime": TEXTS[:2], "photo": TEXTS[2:]}))
    assert read(by_kind) == (TEXTS, ["anime", "anime", "photo"])
    pq.write_table(pa.table({"text": TEXTS, "class": ["x", "y", "x"]}), tmp_path / "i.parquet")
    parquet = str(tmp_path / "i.parquet")
    assert read(parquet, column="text", category_column="class") == (TEXTS, ["x", "y", "x"])


def test_fewer_prompts_are_spread_over_the_set(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps([f"prompt {number}" for number in range(9)]))
    assert read(path)[0] == ["prompt 0", "prompt 3", "prompt 6"]
    with pytest.raises(ValueError, match="asks for 10 prompts, .*a.json holds 9 that differ"):
        read(path, 10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON|JSON"),
        ("a.json", "7", "expected a list of prompts"),
        ("a.json", '["a", 7]', "prompt 2 is 7; expected"),
        ("a.json", '["a", "  "]', "prompt 2 is"),
        ("a.json", json.dumps(["a" * 70_000]), "prompt 1 is 'aaa.*; expected a text of 1 to 65536"),
        ("a.json", '{"a": "b"}', "'a' is no list"),
        ("a.json", '[{"text": "a"}]', "prompt 1 is None; expected"),
        ("a.json", '{"annotations": [{"caption": "a"}]}', "expected annotations like"),
        ("a.yaml", "- a", "expected a file ending in .json, .txt"),
        ("a.csv", "text\na\n", "no column 'prompt'.*set evaluation.prompt_set.column"),
        ("a.jsonl", '{"prompt": "a\\u0000"}', "prompt 1 is"),
    ],
)
def test_what_is_no_set(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path, name, content), 1)


def test_a_set_is_the_one_whose_hash_the_recipe_has(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps(TEXTS))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert read(path, sha256=digest)[0] == TEXTS
    Path(path).write_text(json.dumps(TEXTS[::-1]))
    with pytest.raises(ValueError, match="is another set of prompts"):
        read(path, sha256=digest)


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.json", json.dumps(TEXTS))
    monkeypatch.setattr(prompt_set, "MAX_PROMPTS", 2)
    with pytest.raises(ValueError, match="holds more than 2 prompts"):
        read(path)
    monkeypatch.setattr(prompt_set, "MAX_SET_BYTES", 10)
    with pytest.raises(ValueError, match="10"):
        read(path)


def test_the_store_of_a_set_is_of_its_prompts_alone(tmp_path: Path) -> None:
    """Whatever columns, sizes and pictures the recipe's own prompts have."""
    recipe = parse_recipe(
        {
            "name": "tiny",
            "run_dir": str(tmp_path),
            "model": {"path": "base"},
            "encoder": {"path": "encoder"},
            "embed": {
                "prompts": "p.parquet", "store": "store", "height": 16, "width": 8,
                "prompt_column": "text", "image_column": "image", "height_column": "h",
                "width_column": "w", "mode": "store",
            },
        }
    )  # fmt: skip
    prompts = PromptSet(tuple(Prompt(text, 16, 8) for text in TEXTS), 0)
    small, content = set_recipe(recipe, prompts, str(tmp_path), "prompts")
    Path(small.embed.prompts).parent.mkdir()
    Path(small.embed.prompts).write_bytes(content)
    embed = small.embed
    again = read_prompts(
        embed.prompts, column=embed.prompt_column, height=embed.height, width=embed.width,
        height_column=embed.height_column, width_column=embed.width_column,
        image_column=embed.image_column,
    )  # fmt: skip
    assert again == prompts and Path(embed.store).name.startswith("prompts-")
    assert embed.encoders == recipe.embed.encoders and embed.dtype == recipe.embed.dtype


def test_recipes_with_two_sets_or_emoji() -> None:
    own = PromptSetConfig(path="a.json")
    with pytest.raises(ValueError, match="prompt_list and prompt_set both name prompts"):
        EvaluationConfig(prompt_set=own, prompt_list="b.txt", retrieval=False)
    with pytest.raises(ValueError, match="set evaluation.retrieval=false"):
        EvaluationConfig(prompt_set=own)
