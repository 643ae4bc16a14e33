"""What a hostile object store or hub may make of this machine's disk: nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from piflow import storage
from piflow.storage.foreign import ForeignDataError
from tests.hub import serve_hub
from tests.object_store import serve_objects


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.mark.parametrize(
    "name",
    ["../../evil", "sub/../../../evil", "/evil", "sub//evil", "a\\..\\evil", "e\nvil", "e" * 256],
)
def test_keys_that_lead_out_of_the_folder_write_nothing(name: str, tmp_path: Path) -> None:
    cache = tmp_path / "a" / "b" / "cache"
    with serve_objects({"m/config.json": b"{}", f"m/{name}": b"evil"}) as store:
        with pytest.raises(ForeignDataError, match="names the file .*; expected a relative path"):
            storage.local_folder(store.uri("bucket/m"), cache)
        with pytest.raises(ForeignDataError, match="names the file"):
            storage.list_files(store.uri("bucket/m"))
    assert list(tmp_path.iterdir()) == []


def test_an_honest_store_is_read_as_it_is(tmp_path: Path) -> None:
    objects = {"m/a b#1.json": b"{}", "m/sub/ü.bin": b"x", "m/e" + "e" * 254: b""}
    with serve_objects(objects) as store:
        folder = storage.local_folder(store.uri("bucket/m"), tmp_path)
        assert storage.list_files(store.uri("bucket/m")) == sorted(
            key.removeprefix("m/") for key in objects
        )
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {f"m/{name}" for name in found} == set(objects)


def test_a_download_writes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even through one that comes to lie in its own fresh folder."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    made = tempfile.mkdtemp

    def prepared(*names: str, **options: Any) -> str:
        folder = made(*names, **options)
        Path(folder, "config.json").symlink_to(victim)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", prepared)
    with serve_objects({"m/config.json": b"evil"}) as store:
        with pytest.raises(OSError, match=r"config\.json"):
            storage.local_folder(store.uri("bucket/m"), tmp_path / "cache")
    assert victim.read_text() == "mine"
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_folder_is_deleted_without_following_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim" / "file"
    storage.write_bytes(str(victim), b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(victim.parent)
    (tmp_path / "link").symlink_to(victim.parent)
    for name in ("folder", "link"):
        storage.delete_folder(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["victim"] and victim.exists()


@pytest.mark.parametrize("name", ["../evil", "sub/../../evil", "/evil", "..\\evil"])
def test_a_hub_that_names_files_outside_of_the_snapshot_writes_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfFileSystem, constants

    from tests import hub as loopback

    model = tmp_path / "model"
    for file in ("config.json", "listed-elsewhere"):
        storage.write_bytes(str(model / file), b"{}")
    entry = loopback._entry

    def hostile(folder: Path, path: Path) -> dict[str, object]:
        honest = entry(folder, path)
        return {**honest, "path": name} if path.name == "listed-elsewhere" else honest

    monkeypatch.setattr(loopback, "_entry", hostile)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve_hub({"models/lab/flux": model}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        HfFileSystem.clear_instance_cache()
        folder = storage.local_folder("hf://lab/flux")
        with pytest.raises(ForeignDataError, match="names the file"):
            storage.list_files("hf://lab/flux")
        HfFileSystem.clear_instance_cache()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert [name for name, _ in served.sent] == ["config.json"]


def test_a_local_folder_may_have_names_that_no_store_may(tmp_path: Path) -> None:
    (tmp_path / "a\\b\n").write_text("")
    assert storage.list_files(str(tmp_path)) == ["a\\b\n"]
    assert storage.list_files(f"file://{tmp_path}") == ["a\\b\n"]
    assert isinstance(storage.filesystem(str(tmp_path))[0], fs.LocalFileSystem)
