"""Hashes of all bytes of weights: made when asked for, then known as long as no file changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from piflow.storage import whole
from piflow.storage.fingerprint import weights_fingerprint
from piflow.storage.whole import known_hashes, whole_hashes
from tests.object_store import serve_objects


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "base"
    place.mkdir()
    for number in range(2):
        weights = torch.randn(200, 200, generator=torch.Generator().manual_seed(number))
        save_file({f"{number}.weight": weights}, place / f"{number}.safetensors")
    (place / "config.json").write_text("{}")
    return place


def test_they_are_those_of_all_bytes_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known_hashes(str(folder)) is None
    expected = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("0.safetensors", "1.safetensors")
    }
    assert whole_hashes(str(folder)) == expected
    monkeypatch.setattr(whole, "sha256", lambda _: pytest.fail("read again"))
    assert known_hashes(str(folder)) == expected == known_hashes(f"file://{folder}")


def test_a_change_that_the_fingerprint_misses_is_found(folder: Path) -> None:
    """One value away from start, middle and end, with the file's time set back."""
    before, sample = whole_hashes(str(folder)), weights_fingerprint(str(folder))
    file = folder / "1.safetensors"
    times = file.stat()
    tensors = load_file(file)
    tensors["1.weight"].view(-1)[10_000] += 1
    save_file(tensors, file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_fingerprint(str(folder)) == sample
    assert known_hashes(str(folder)) is None, "of bytes that aren't there any more"
    after = whole_hashes(str(folder))
    assert [name for name in before if before[name] != after[name]] == ["1.safetensors"]


@pytest.mark.parametrize("note", ["", "[]", '{"stamp": 1, "sha256": 2}', "{" * 1000])
def test_damaged_notes_count_for_nothing(folder: Path, tmp_path: Path, note: str) -> None:
    whole_hashes(str(folder))
    for file in (tmp_path / "cache/piflow/sha256").iterdir():
        file.write_text(note)
    assert known_hashes(str(folder)) is None


def test_of_an_object_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    files = {f"base/{file.name}": file.read_bytes() for file in folder.iterdir()}
    with serve_objects(files) as store:
        uri = store.uri("bucket/base")
        assert known_hashes(uri) is None
        assert whole_hashes(uri) == whole_hashes(str(folder)) == known_hashes(uri)


def test_places_without_weights(tmp_path: Path) -> None:
    assert known_hashes(str(tmp_path)) is None and whole_hashes(str(tmp_path)) == {}
