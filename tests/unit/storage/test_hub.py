"""Files of the Hugging Face hub, by its own client over HTTP from a hub on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from piflow import storage
from piflow.config import ModelConfig
from piflow.data.prompts import read_prompts
from tests.hub import COMMIT, TOKEN, Hub, serve_hub


@pytest.fixture
def hub(tmp_path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model with a transformer and a dataset; the client has an empty cache and no token."""
    from huggingface_hub import HfFileSystem, constants

    model, data = tmp_path / "model", tmp_path / "data"
    (model / "vae").mkdir(parents=True)
    (model / "vae/config.json").write_text("{}")
    shutil.copytree(flux_folder, model / "transformer")
    (data / "data").mkdir(parents=True)
    (data / "data/a.txt").write_text("a red heart\n")
    (data / "data/b.txt").write_text("a blue one\n")
    with serve_hub({"models/lab/flux": model, "datasets/lab/prompts": data}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served
        HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_model_is_the_one_in_a_local_folder(hub: Hub, flux_folder: Path, revision: str) -> None:
    import torch

    from piflow.backbones import load_backbone

    loaded = load_backbone(ModelConfig(path=f"hf://lab/flux{revision}/transformer"))
    local = load_backbone(ModelConfig(path=str(flux_folder)))
    for mine, other in zip(loaded.module.parameters(), local.module.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_shards_are_filled_from_one_download_a_machine(hub: Hub, flux_folder: Path) -> None:
    import torch

    from piflow.backbones import load_backbone, load_empty_backbone
    from piflow.sharding.weights import fill, missing

    model = ModelConfig(path="hf://lab/flux/transformer")
    weights = (flux_folder / "diffusion_pytorch_model.safetensors").stat().st_size
    for _ in range(2):  # two workers, or a worker and its replacement
        backbone, sources = load_empty_backbone(model)
        fill(backbone.module, missing(backbone.module, sources), device="cpu")
    whole = load_backbone(ModelConfig(path=str(flux_folder)))
    for mine, other in zip(backbone.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, other)
    sent = [size for name, size in hub.sent if name.endswith(".safetensors")]
    assert sum(sent) == weights


def test_only_the_folder_is_downloaded(hub: Hub) -> None:
    folder = storage.local_folder("hf://lab/flux/vae")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert [name for name, _ in hub.sent] == ["vae/config.json"]


def test_what_was_downloaded_is_found_when_the_hub_is_away(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    storage.local_folder("hf://lab/flux/vae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (storage.local_folder("hf://lab/flux/vae") / "config.json").is_file()


def test_prompts_come_from_a_dataset(hub: Hub) -> None:
    found = read_prompts("hf://datasets/lab/prompts/data/*.txt", height=32, width=32)
    assert [prompt.text for prompt in found.prompts] == ["a red heart", "a blue one"]


def test_files_are_read_by_ranges(hub: Hub, flux_folder: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    content = (flux_folder / name).read_bytes()
    system, path = storage.filesystem(f"hf://lab/flux/transformer/{name}")
    with system.open_input_file(path) as file:
        assert file.size() == len(content)
        file.seek(100)
        assert file.read(50) == content[100:150]
    assert storage.exists("hf://lab/flux/transformer") and not storage.exists("hf://lab/flux/no")
    assert storage.list_files("hf://lab/flux/transformer") == ["config.json", name]
    assert storage.read_bytes("hf://lab/flux/vae/config.json") == b"{}"


@pytest.mark.parametrize("read", [storage.exists, storage.local_folder])
@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("hf://lab/no-such/vae", "no such repository, or HF_TOKEN gives no access to it"),
        ("hf://lab/flux@v2/vae", "the repository has no such revision"),
        ("hf://lab/gated/vae", "its licence must be accepted on its page first, and HF_TOKEN"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, read: Any, uri: str, reason: str) -> None:
    hub.folders["models/lab/gated"] = hub.folders["models/lab/flux"]
    hub.gated.add("models/lab/gated")
    kind = FileNotFoundError if "@v2" in uri else PermissionError
    with pytest.raises(kind, match=reason):
        read(uri)


def test_a_token_opens_a_gated_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("models/lab/flux")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (storage.local_folder("hf://lab/flux/vae") / "config.json").is_file()
    assert storage.read_bytes("hf://lab/flux/vae/config.json") == b"{}"


def test_the_hub_is_never_written(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"read-only; write to a local path or s3://"):
        storage.write_bytes("hf://lab/flux/a", b"")


@pytest.mark.parametrize(
    "uri", ["hf://flux", "hf://datasets/prompts", "hf://spaces/lab/x", "hf://"]
)
def test_uris_without_a_repository_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="names no repository; expected hf://owner/name/folder"):
        storage.filesystem(uri)


def test_siblings_stay_inside_the_repository() -> None:
    assert storage.sibling("hf://lab/flux@v1/transformer", "vae") == "hf://lab/flux@v1/vae"
    with pytest.raises(ValueError, match="has nothing beside it"):
        storage.sibling("hf://lab/flux", "vae")
