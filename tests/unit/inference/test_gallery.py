"""Every picture has a file of its own, and the index says what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from piflow.inference.gallery import INDEX, Gallery, Request, slug

SETTINGS = {"adapter_sha256": "a", "height": 8}
HARD = [  # prompts that agree in their first 60 letters and digits of ASCII, or have none
    "a very long beginning that many prompts share, word for word, and then a cat",
    "a very long beginning that many prompts share, word for word, and then a dog",
    "a very long beginning that many prompts share; word for word... AND THEN a cat",
    "红色的心",
    "красное сердце",
    "❤️",
    "?!",
]


def wanted(prompts: list[str], seeds: tuple[int, ...] = (0, 1)) -> list[Request]:
    return [Request(n, prompt, seed) for n, prompt in enumerate(prompts, 1) for seed in seeds]


def content(request: Request) -> bytes:
    return f"{request.prompt} {request.seed}".encode()


def filled(folder: Path, requests: list[Request], **settings: object) -> Gallery:
    gallery = Gallery(str(folder), {**SETTINGS, **settings}, {"device": "cpu"})
    for request in gallery.missing(requests):
        gallery.add(request, content(request))
    gallery.close()
    return gallery


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / INDEX).read_text().split("\n")[:-1]]


def test_prompts_that_look_alike_have_files_of_their_own(tmp_path: Path) -> None:
    requests = wanted(HARD)
    gallery = filled(tmp_path, requests)
    assert len(list(tmp_path.glob("*.png"))) == 14
    for request in requests:
        assert Path(gallery.file(request)).read_bytes() == content(request)
        assert Path(gallery.file(request)).name.isascii()
    entries = lines(tmp_path)
    assert [(entry["prompt"], entry["seed"]) for entry in entries] == [
        (request.prompt, request.seed) for request in requests
    ]
    assert all(entry["height"] == 8 and entry["device"] == "cpu" for entry in entries)
    assert (tmp_path / str(entries[0]["file"])).read_bytes() == content(requests[0])


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    requests = wanted(HARD)
    gallery = filled(tmp_path, requests[:5])
    Path(gallery.file(requests[0])).unlink()
    Path(gallery.file(requests[1])).write_bytes(b"another")
    again = Gallery(str(tmp_path), SETTINGS)
    assert again.missing(requests) == [requests[0], requests[1], *requests[5:]]


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    left, below = tmp_path / ".0001-a.png.0a1b2c3d.partial", tmp_path / "sub"
    below.mkdir()
    for path in (left, below / left.name):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    filled(tmp_path, [])
    assert not left.exists() and (below / left.name).exists(), "a folder below is another's"


def test_other_settings_and_places_never_overwrite(tmp_path: Path) -> None:
    first = wanted(["a cat"], (3,))
    filled(tmp_path, first)
    filled(tmp_path, first, height=16)
    filled(tmp_path, wanted(["a dog"], (3,)))
    moved = [Request(7, "a cat", 3)]
    assert Gallery(str(tmp_path), SETTINGS).missing(moved) == []
    assert len(list(tmp_path.glob("*.png"))) == 3 == len(lines(tmp_path))


def test_a_file_of_that_name_is_kept(tmp_path: Path) -> None:
    """Such as one whose index was lost by a kill, drawn on another machine."""
    (request,) = wanted(["a cat"], (3,))
    earlier = Path(filled(tmp_path, [request]).file(request))
    earlier.write_bytes(b"earlier")
    (tmp_path / INDEX).unlink()
    gallery = filled(tmp_path, [request])
    assert earlier.read_bytes() == b"earlier"
    assert Path(gallery.file(request)).read_bytes() == content(request)
    assert gallery.file(request) != str(earlier)


def test_two_processes_share_an_index(tmp_path: Path) -> None:
    one, other = Gallery(str(tmp_path), SETTINGS), Gallery(str(tmp_path), SETTINGS)
    requests = wanted(HARD[:2], (0,))
    one.add(requests[0], b"1")
    other.add(requests[1], b"2")
    one.close()
    other.close()
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"file": "a.png"}',
        '{"file": "../a.png", "key": "k", "seed": 1, "sha256": "s"}',
        '{"file": "/etc/passwd", "key": "k", "seed": 1, "sha256": "s"}',
        '{"file": null, "key": "k", "seed": 1, "sha256": "s"}',
        "[" * 10_000,
    ],
)
def test_an_index_that_is_none_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    filled(tmp_path, wanted(["a cat"], (0,)))
    with (tmp_path / INDEX).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match="line 2 of .*index.jsonl"):
        Gallery(str(tmp_path), SETTINGS)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Red Heart!", "red-heart"),
        ("Crème brûlée", "creme-brulee"),
        ("../../etc/passwd", "etc-passwd"),
        ("❤️ 红", "prompt"),
        ("x" * 1000, "x" * 40),
        ("word " * 20, "word-word-word-word-word-word-word-word"),
    ],
)
def test_slugs_are_safe(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected
