"""Recipes that mean harm, or that say something else than they seem to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from piflow.config import RecipeError, load_recipe, parse_recipe, plain_yaml

MINIMAL: dict[str, Any] = {
    "name": "test",
    "run_dir": "runs/test",
    "model": {"path": "teacher"},
    "encoder": {"path": "encoder"},
    "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 9)
)


def refusal(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert time.monotonic() - start < 30, "it takes milliseconds on a quiet machine"
    message = str(caught.value)
    assert len(message) < 10_000 and message.startswith((str(path), "recipe"))
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB, "more than 10000 values, aliases counted"),
        (MERGES, "more than 10000 values, aliases counted"),
        ("name: &a [*a]\n", "alias of what it stands in"),
        ("name: " + "[" * 200_000, "more than 32 levels"),
        ("name: " + "{a: " * 33, "more than 32 levels"),
        ("name: " + "- " * 1000, "not valid YAML"),
        ("# " + "x" * 300_000, "more than 262144 bytes"),
        ("name: " + "1" * 5000, "a number of 5000 digits"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML: could not determine"),
        ("name: !!python/name:os.system\n", "not valid YAML: could not determine"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
        ("name: a\nmodel: {path: b}\nname: c\n", r"'name' stands twice, also in line 1"),
        ("model:\n  path: a\n  path: b\n", r"'path' stands twice.*\(line 3, column 3\)"),
        ("name: a\n---\nname: b\n", "expected a single document"),
        ("name: a\tb\n\tc: 1\n", "not valid YAML"),
        ("name: a\x07b\n", "not valid YAML"),
        ("name: a\n".encode("utf-16"), "not UTF-8 text.*save it as UTF-8"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "is empty"),
        ("# nothing\n", "is empty"),
        ("null\n", "is empty"),
        ("- a\n", "mapping of sections, found a list"),
        ("just text\n", "mapping of sections, found plain text"),
    ],
)
def test_a_file_that_is_refused(content: str | bytes, expected: str, tmp_path: Path) -> None:
    import re

    message = refusal(tmp_path / "recipe.yaml", content)
    assert re.search(expected, message, re.S), message


def test_a_few_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "embed"})
    path.write_text(
        text + "embed:\n  <<: &size {height: 32, width: 32}\n  prompts: p.txt\n  store: s\n"
        "  buckets: [&b [32, 32], *b]\n"
    )
    assert load_recipe(path).embed.buckets == [[32, 32], [32, 32]]


def test_what_the_file_says_reaches_the_terminal_escaped_and_cut(tmp_path: Path) -> None:
    hostile = {**MINIMAL, "\x1b[2Jkey": 1, "seed": "\x1b]0;title\x07", "name": "n" * 100_000}
    message = refusal(tmp_path / "recipe.yaml", yaml.safe_dump(hostile))
    assert "\x1b" not in message and "\x07" not in message and "\\x1b[2Jkey" in message
    deep = {**MINIMAL, "lora": [["x" * 1000] * 1000] * 9}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(deep)
    assert len(str(caught.value)) < 1000
    with pytest.raises(RecipeError, match=r"5000 problem\(s\)") as caught:
        parse_recipe({**MINIMAL, **{f"key{number}": 1 for number in range(5000)}})
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("2026-11-29", "2026-11-29"),
        ("=", "="),
        ("$HOME", "$HOME"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = plain_yaml.load_mapping(f"key: {text}\n".encode(), where="it")["key"]
    assert read == value and type(read) is type(value)
    assert plain_yaml.load_value(text, where="it") == value
    again = plain_yaml.load_mapping(plain_yaml.dump({"key": text, "v": value}).encode(), where="it")
    assert again == {"key": text, "v": value} and type(again["v"]) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a #b", "a #b"),
        ("*.txt", "*.txt"),
        ("a: b", "a: b"),
        ("&x", "&x"),
        ("[a, 'b #c']", ["a", "b #c"]),
        ("{a: 1e3}", {"a": 1000.0}),
        ("'7'", "7"),
        (" 7 ", 7),
    ],
)
def test_an_override_is_one_whole_value(text: str, value: Any) -> None:
    assert plain_yaml.load_value(text, where="it") == value


@pytest.mark.parametrize("text", ["[a] #b", "'a' b", "[a", "{a: 1, a: 2}", "[" * 100])
def test_an_override_that_is_cut_or_wrong_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="it is not valid YAML"):
        plain_yaml.load_value(text, where="it")


def test_sqlite_of_a_relative_path_is_one_file_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = parse_recipe(MINIMAL)
    recipe = parse_recipe({**MINIMAL, "tracking": {"uri": "sqlite:///mlflow.db?timeout=9"}})
    assert recipe.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db?timeout=9"
    assert recipe.hash() == plain.hash()
    monkeypatch.chdir("/")
    assert parse_recipe(recipe.model_dump(mode="json")).tracking.uri == recipe.tracking.uri
    for uri in ("sqlite://x.db", "sqlite://", "sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(RecipeError, match="SQLite needs a file: expected sqlite:///path.db"):
            parse_recipe({**MINIMAL, "tracking": {"uri": uri}})


def test_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'training.batchsize'; did you mean 'batch_size'"):
        parse_recipe({**MINIMAL, "training": {"batchsize": 3}})
