"""Prompts files and pictures that are hostile, broken or of another kind than their name says."""

from __future__ import annotations

import gzip
import http.server
import io
import os
import re
import shutil
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from piflow import storage
from piflow.config import EmbedConfig, ModelConfig
from piflow.data import embed as embed_module
from piflow.data import pictures as pictures_module
from piflow.data import prompt_rows
from piflow.data.manifest import SkippedPicture
from piflow.data.pictures import LatentEncoder, fit_picture
from piflow.data.prompts import PromptSet, prompt_files, read_prompts
from piflow.storage.fingerprint import files_sha256
from piflow.storage.picture import BadPictureError, open_picture
from piflow.storage.places import NamedPlaces, require_prefix

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n"


def read(path: Path | str, **settings: Any) -> PromptSet:
    return read_prompts(str(path), height=8, width=8, **settings)


def read_picture(folder: Path, name: str, *, allow: list[str] | None = None) -> Any:
    """What the encoder makes of one row that names a picture."""
    (folder / "p.jsonl").write_text(f'{{"prompt": "a", "image": "{name}"}}\n')
    embed = EmbedConfig(
        prompts="unused", store="unused", height=8, width=8, image_column="image",
        allow_uris=allow or [], bad_pictures="skip",
    )  # fmt: skip
    found = read(folder / "p.jsonl", image_column="image", allow_uris=embed.allow_uris)
    [result] = LatentEncoder(ModelConfig(path="unused"), embed, "cpu").encode(found.prompts)
    return result


def png(width: int = 8, height: int = 8) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(sink, "png")
    return sink.getvalue()


# ------------------------------------------------------------------------------ what a row may name


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_row_sends_no_request_to_a_host_of_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with listener() as (host, asked):
        uri = f"s3://bucket/a.png?endpoint_override={host}&scheme=http"
        with pytest.raises(ValueError, match="p.jsonl, line 1: .*lies outside of.*allow_uris"):
            read_picture(tmp_path, uri)
        assert asked == []
        allowed = f"s3://bucket?scheme=http&endpoint_override={host}"
        with pytest.raises(OSError, match="can't be read"):
            read_picture(tmp_path, uri, allow=[allowed])
        assert asked  # so the request would have been seen


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "../outside.png",
        "a/../../outside.png",
        "s3://bucket/a.png",
        "hf://owner/name/a.png",
        "package://antigravity/a.png",
        "http://127.0.0.1/a.png",
        "https://user:secret@host/a.png",
        "~root/../../etc/passwd",
        "a\\u0000b.png",
        ".",
        "x" * 5000,
    ],
)
def test_a_row_names_nothing_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.png").write_bytes(png())
    with pytest.raises(ValueError, match="p.jsonl, line 1: ") as caught:
        read_picture(tmp_path / "inside", name)
    assert "secret" not in str(caught.value)


def test_a_package_in_a_row_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="package:// is for recipes only"):
        read_picture(tmp_path, "package://planted.sub/a.png")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="can't be allowed to rows"):
        require_prefix("package://planted")


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(png())
    (inside / "b.png").write_bytes(png())
    (inside / "a.png").symlink_to(outside / "a.png")
    (inside / "folder").symlink_to(outside)
    (inside / "c.png").symlink_to("b.png")
    for name in ("a.png", "folder/a.png"):
        with pytest.raises(ValueError, match="is a link to .*outside/a.png.*allow_uris"):
            read_picture(inside, name)
        assert not isinstance(read_picture(inside, name, allow=[str(outside)]), SkippedPicture)
    assert not isinstance(read_picture(inside, "c.png"), SkippedPicture)
    (tmp_path / "link").symlink_to(inside)  # the prompts file's own folder may be one
    assert not isinstance(read_picture(tmp_path / "link", "./b.png"), SkippedPicture)


@pytest.mark.parametrize(
    ("allowed", "name", "fine"),
    [
        ("/data/set", "/data/set/a.png", True),
        ("/data/set", "/data/settle/a.png", False),
        ("/data/set", "/data/set/../b.png", False),
        ("/data/set/", "file:///data/x/../set/a.png", True),
        ("s3://b/set", "s3://b/set/a.png", True),
        ("s3://b/set", "s3://b/settle/a.png", False),
        ("s3://b", "s3://b.evil/a.png", False),
        ("gs://data/set", "gs://data/set/a.png", True),
        ("gs://data/set", "s3://data/set/a.png", False),
        ("gs://data", "gs://data/a.png?endpoint_override=evil", False),
        (
            "abfs://data@a12.dfs.core.windows.net/set",
            "abfs://data@a12.dfs.core.windows.net/set/a",
            True,
        ),
        (
            "abfs://data@a12.dfs.core.windows.net/set",
            "abfs://data@b12.dfs.core.windows.net/set/a",
            False,
        ),
        ("s3://b/set", "s3://b/set/%2e%2e/c.png", False),
        ("s3://b/set", "s3://b/set/a.png?endpoint_override=evil", False),
        ("s3://b/set", "s3://b/set/a.png?region=evil.com%23", False),
        ("s3://b/set?region=x&scheme=http", "s3://b/set/a.png?scheme=http&region=x", True),
        ("hf://datasets/o/n", "hf://datasets/o/n/a.png", True),
        ("hf://datasets/o/n", "hf://o/n/a.png", False),
        ("hf://datasets/o/n", "hf://datasets/o/n2/a.png", False),
        ("hf://datasets/o/n@v1/data", "hf://datasets/o/n@v1/data/a.png", True),
    ],
)
def test_allowed_places_are_compared_by_whole_parts(allowed: str, name: str, fine: bool) -> None:
    require_prefix(allowed)
    places = NamedPlaces("/prompts/p.jsonl", [allowed])
    if fine:
        places.resolve(name)
    else:
        with pytest.raises(ValueError):
            places.resolve(name)


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("a.png", True),
        ("s3://bucket/other/a.png?region=eu", True),
        ("../other/a.png", True),
        ("../../other-bucket/a.png", False),
        ("s3://bucket/a.png", False),  # another endpoint: AWS's default region
        ("s3://bucket/../other/a.png?region=eu", False),
        ("s3://other/a.png?region=eu", False),
        ("/etc/passwd", False),
    ],
)
def test_rows_on_s3_name_their_own_bucket(name: str, fine: bool) -> None:
    places = NamedPlaces("s3://bucket/data/p.jsonl?region=eu")
    if fine:
        assert places.resolve(name).startswith("s3://bucket/")
    else:
        with pytest.raises(ValueError, match="outside of|plain path"):
            places.resolve(name)


@pytest.mark.parametrize("prefix", ["ftp://b", "", "http://h", "s3://b/../c", "s3://"])
def test_unusable_allowed_places_are_refused_in_the_recipe(prefix: str) -> None:
    with pytest.raises(ValueError, match="allow_uris"):
        EmbedConfig(prompts="p", store="s", height=8, width=8, allow_uris=[prefix])


# ----------------------------------------------------------------------------------------- decoders

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
"""


def test_an_eps_picture_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "gs"
    binary.parent.mkdir()
    binary.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("gs") == str(binary)
    with pytest.raises(BadPictureError, match=r"an EPS or PostScript file; expected PNG, JPEG"):
        fit_picture(EPS, 8, 8)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "ICO", "JPEG2000", "PDF", "SGI", "ICNS"])
def test_other_formats_of_pillow_are_not_opened(kind: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (32, 32)).save(sink, kind)
    with pytest.raises(BadPictureError, match="expected PNG, JPEG, WEBP, GIF, TIFF, BMP"):
        open_picture(sink.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_pictures_are_opened_by_content(tmp_path: Path, kind: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(sink, kind)
    (tmp_path / "a.eps").write_bytes(sink.getvalue())
    assert not isinstance(read_picture(tmp_path, "a.eps"), SkippedPicture)


def test_of_a_moving_picture_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        sink = io.BytesIO()
        frames[0].save(sink, kind, save_all=True, append_images=frames[1:])
        first = fit_picture(sink.getvalue(), 8, 8)[:, 4, 4]
        assert first[0] > 0.95 and first[2] < -0.95


def test_pictures_are_opened_at_one_place_alone() -> None:
    """Pillow's `Image.open` without its list of formats would start Ghostscript."""
    package = Path(storage.__file__).parents[1]
    found = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"Image\.open\(|ImageFile|from_file\(", path.read_text())
    ]
    assert found == ["storage/picture.py"]


def test_pointers_of_git_lfs_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="model.safetensors is a Git LFS pointer.*git lfs pull"):
        files_sha256({"model": tmp_path}, {})


def test_prompts_are_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="p.txt is no regular file"):
        read(tmp_path / "p.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="dataset folder .*folder.txt has no"):
        read(tmp_path / "folder.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises((OSError, ValueError), match="loop.txt"):
        read(tmp_path / "loop.txt")


def test_what_skipped_pictures_say_reaches_no_terminal_raw() -> None:
    item = SkippedPicture(prompt_id="0" * 16, picture="a\x1b[2J.png", reason="b\x1b]0;c\x07")
    assert embed_module._example(item) == "'a\\x1b[2J.png': b\\x1b]0;c\\x07"


def test_a_pointer_of_git_lfs_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(POINTER)
    skipped = read_picture(tmp_path, "a.png")
    assert isinstance(skipped, SkippedPicture) and "git lfs pull" in skipped.reason
    for name in ("p.txt", "p.csv", "p.parquet", "p.txt.gz", "p.jsonl"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
            read(tmp_path / name)


# -------------------------------------------------------------------------------------------- bombs


def bomb(width: int, height: int) -> bytes:
    """A valid grey PNG of one colour: a thousandth of its pixels in bytes."""
    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(b"\0" * (width + 1)) for _ in range(height)) + packed.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadPictureError, match="100x200 pixels, at most 9999 .*max_picture_pixels"):
        open_picture(bomb(200, 100), max_pixels=9999)
    big = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    content = png()
    header = content[12:16] + big + content[24:29]
    content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with pytest.raises(BadPictureError, match="not a readable image file|pixels, at most"):
        open_picture(content)


def test_one_large_picture_is_decoded_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = [0], [0]
    lock = threading.Lock()

    def fit(*args: Any, **keys: Any) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        found = original(*args, **keys)
        with lock:
            now[0] -= 1
        return found

    original = fit_picture
    monkeypatch.setattr(pictures_module, "fit_picture", fit)
    monkeypatch.setattr(pictures_module, "_LARGE_PIXELS", 1000)
    rows = []
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(600, 400))
        rows.append(f'{{"prompt": "a", "image": "{number}.png"}}\n')
    (tmp_path / "p.jsonl").write_text("".join(rows))
    embed = EmbedConfig(prompts="p", store="s", height=8, width=8, image_column="image")
    prompts = read(tmp_path / "p.jsonl", image_column="image").prompts
    assert len(list(LatentEncoder(ModelConfig(path="unused"), embed, "cpu").encode(prompts))) == 12
    assert most[0] == 1


def test_a_tiff_tile_is_no_larger_than_a_picture() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 2**15, 323: 2**15, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4
    with pytest.raises(BadPictureError, match="tiles of 32768x32768 pixels"):
        open_picture(content)


def test_a_picture_file_of_too_many_bytes_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "a.png").open("wb") as sparse:
        sparse.truncate(2**40)
    skipped = read_picture(tmp_path, "a.png")
    assert isinstance(skipped, SkippedPicture) and "at most 536870912" in skipped.reason


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_a_line_without_end_is_not_unpacked(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p.{ending}.gz"
    header = b"prompt\n" if ending == "csv" else b""
    with gzip.open(path, "wb", compresslevel=1) as sink:
        sink.write(header)
        for _ in range(40):
            sink.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"p.{ending}.gz, line [12]: more than 16777216 bytes"
        ):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
    finally:
        tracemalloc.stop()


def test_a_csv_row_over_many_lines_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_rows, "MAX_LINE_BYTES", 10_000)
    path = tmp_path / "p.csv"
    path.write_bytes(b"prompt\n" + b'"a\nb",' * 5000)
    with pytest.raises(ValueError, match="more than 10000 bytes in one line or row"):
        read(path)
    path.write_bytes(b"prompt\n" + b'"a\nb"\n' * 5000)  # many rows are fine
    assert read(path).duplicates == 4999


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "parquet"])
def test_a_prompt_is_no_book(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p.{ending}"
    text = "é" * 40_000
    if ending == "parquet":
        pq.write_table(pa.table({"prompt": [text]}), path)
    else:
        form = {"txt": "{}\n", "jsonl": '{{"prompt": "{}"}}\n', "csv": "prompt\n{}\n"}[ending]
        path.write_text(form.format(text))
    with pytest.raises(ValueError, match="the prompt has 80000 bytes, at most 65536") as caught:
        read(path)
    assert len(str(caught.value)) < 400


def test_rows_are_counted_against_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\na\n")
    assert len(read(path, max_prompts=3).prompts) == 2
    with pytest.raises(ValueError, match=r"p.txt: more than 2 rows.*raise embed.max_prompts"):
        read(path, max_prompts=2)
    path.write_text("".join(f"{'x' * 2000} {number}\n" for number in range(10)))
    with pytest.raises(ValueError, match="than 10240 characters of distinct prompts"):
        read(path, max_prompts=10)


def test_a_parquet_text_that_is_repeated_is_not_copied(tmp_path: Path) -> None:
    """2 KB that would be 4 GB as rows of 4 MB."""
    path = tmp_path / "p.parquet"
    texts = pa.array(["x" * 2**22]).dictionary_encode()
    indices = pa.array(np.zeros(1000, np.int32))
    column = pa.DictionaryArray.from_arrays(indices, texts.dictionary)
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd")
    assert path.stat().st_size < 5000
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ValueError, match="row 1: the prompt has 4194304 bytes"):
            read(path)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 100 * 2**20


def test_pictures_that_are_repeated_in_parquet_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    picture = {"bytes": b"x" * 2**20, "path": "x"}
    pq.write_table(
        pa.table({"prompt": ["a"] * 50, "image": [picture] * 50}), path, compression="zstd"
    )
    monkeypatch.setattr(prompt_rows, "MAX_CHUNK_BYTES", 20 * 2**20)
    monkeypatch.setattr(prompt_rows, "_BATCH_BYTES", 4 * 2**20)
    with pytest.raises(ValueError, match="column 'image' takes more than .* in row group 0"):
        read(path, image_column="image")
    pq.write_table(pa.table({"prompt": ["a"], "image": [b"x" * 30 * 2**20]}), path)
    with pytest.raises(ValueError, match="column 'image' takes more than .*smaller ones"):
        read(path, image_column="image")


# --------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "red\ncat\n".encode("utf-16-le"), "line 1: not UTF-8 .*iconv"),
        ("p.txt", "猫\n犬\n".encode("utf-16-be"), "line 1: not UTF-8"),
        ("p.txt", "red\ncat\n".encode("utf-16"), "line 1: not UTF-8 .*iconv"),
        ("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16-le"), "line 1: not UTF-8 .*iconv"),
        ("p.csv", "prompt\na\n".encode("utf-16-be"), "line 1: not UTF-8 .*iconv"),
        ("p.csv", "prompt\na\n".encode("utf-32"), "line 1: not UTF-8 .*iconv"),
        ("p.txt", b"a\nb\0c\n", "line 2: not UTF-8 text .NUL"),
        ("p.jsonl", b'{"prompt": "a\\u0000b"}\n', "line 1: the prompt .*holds NUL"),
        ("p.txt", b"red\rcat\rdog", "line 1: a carriage return within the line.*tr"),
        ("p.csv", b"prompt\rred\rcat", "line 1: new-line character"),
        ("p.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}', "line 1 isn't JSON"),
        ("p.txt", b"a\n\xe2\x80\x8b\xef\xbb\xbf\n", "line 2: the prompt holds nothing .*u200b"),
        ("p.jsonl", b'{"prompt": "\\u3164\\u2060"}', "line 1: the prompt holds nothing"),
        ("p.csv", b"prompt,n,prompt\na,1,b\n", "2 columns of the name 'prompt'"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 isn't JSON: key 'prompt' stands"),
        ("p.jsonl", b'{"prompt": "a"}\n{"n": ' + b"[" * 10**5, "line 2 nests JSON deeper"),
        ("p.jsonl", b'{"n": ' + b"[" * 70 + b"]" * 70 + b"}", "line 1 nests JSON deeper"),
        ("p.csv", b"pr\x1b[2Jompt\na\n", r"available: pr\\x1b\[2Jompt"),
    ],
)
def test_texts_that_are_none_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}") as caught:
        read(tmp_path / name)
    assert not {"\x1b", "\0", "\u200b"} & set(str(caught.value))


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet has 2 columns of the name 'prompt'"):
        read(tmp_path / "p.parquet")


def test_what_can_be_seen_is_a_prompt(tmp_path: Path) -> None:
    texts = [
        "\U0001fae8",
        "…",
        "𝕏",
        "한",
        "👩\u200d🚀",
        "\u064e م",
    ]  # the first is newer than Python
    (tmp_path / "p.txt").write_text("".join(f"{text}\n" for text in texts))
    assert [prompt.text for prompt in read(tmp_path / "p.txt").prompts] == texts


def test_byte_order_marks_of_joined_files_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffred\n".encode() * 2)
    assert read(tmp_path / "p.txt").duplicates == 1


# ---------------------------------------------------------------------------------- missing parts


def parts(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("prompt\na\n")


def test_a_missing_part_of_a_set_is_named(tmp_path: Path) -> None:
    parts(tmp_path, "train-00000-of-00003.csv", "train-00002-of-00003.csv")
    for uri in (str(tmp_path), f"{tmp_path}/*.csv", f"{tmp_path}/train-0000[0-2]-*"):
        with pytest.raises(ValueError, match="train-00001-of-00003.csv is missing"):
            prompt_files(uri)
    assert len(prompt_files(f"{tmp_path}/train-0000[02]-of-00003.csv")) == 2  # as it was asked for
    assert len(prompt_files(f"{tmp_path}/train-00002-of-00003.csv")) == 1
    parts(tmp_path, "train-00001-of-00003.csv")
    assert len(prompt_files(str(tmp_path))) == 3
    parts(tmp_path, "train-00000-of-99999999.csv")
    with pytest.raises(ValueError, match="train-00001-of-99999999.csv is missing"):
        prompt_files(str(tmp_path))


def test_a_tilde_in_a_row_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("p.jsonl", f"{tmp_path}/p.jsonl"):
        assert NamedPlaces(file).resolve("~root/a.png") == f"{tmp_path}/~root/a.png"
        assert NamedPlaces(file, [str(tmp_path.parent)]).resolve("../b") == f"{tmp_path.parent}/b"
