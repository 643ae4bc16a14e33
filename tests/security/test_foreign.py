"""Names, texts and JSON from outside."""

from __future__ import annotations

import pytest

from piflow.storage.foreign import (
    ForeignDataError,
    parse_json,
    parse_object,
    relative_name,
    shown,
)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../a",
        "a/../../b",
        "a//b",
        "a/.",
        "a\\..\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 1025,
        None,
        7,
        ["a"],
    ],
)
def test_a_name_that_leaves_its_folder_is_refused(name: object) -> None:
    with pytest.raises(ForeignDataError, match="the manifest names the file"):
        relative_name(name, where="the manifest")


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", ".hidden", "..a", "ü/日本 1.png", "a:b"])
def test_a_name_below_its_folder_is_taken_as_it_is(name: str) -> None:
    assert relative_name(name, where="the manifest") == name


def test_shown_text_has_one_line_and_no_escapes() -> None:
    hostile = "a\x1b[2Jb\r\nc\u202ed\u2028e\x9bf"
    assert shown(hostile) == "a\\x1b[2Jb\\r\\nc\\u202ed\\u2028e\\x9bf"
    assert shown("日本 é") == "日本 é"
    assert shown("x" * 300, 10) == "x" * 10 + "… (300 characters)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nests JSON deeper than 64"),
        (b"[" * 65 + b"1" + b"]" * 65, "nests JSON deeper than 64"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"\xff\xfe{", "isn't JSON"),
        (b"{", "isn't JSON"),
        (b"", "isn't JSON"),
        (b"1" * 5000, "isn't JSON"),
        (b" " * 101, "101 bytes of JSON; at most 100"),
    ],
)
def test_json_that_is_refused(content: bytes, message: str) -> None:
    limit = 100 if content.isspace() else 2**20
    with pytest.raises(ForeignDataError, match=message):
        parse_json(content, where="it", max_bytes=limit)


def test_json_that_is_read() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, where="it") is not None
    assert parse_json(b'\xef\xbb\xbf{"a": [1, {"b": null}]}', where="it") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("content", ["[]", "null", "3", '"a"'])
def test_another_value_than_an_object_is_named(content: str) -> None:
    with pytest.raises(ForeignDataError, match="config.json holds JSON of type"):
        parse_object(content, where="config.json")
