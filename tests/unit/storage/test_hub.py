"""Files of the Hugging Face hub, by its own client over HTTP from a hub on loopback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from piflow import storage
from piflow.config import ModelConfig, parse_recipe
from piflow.data.prompts import read_prompts
from piflow.storage.fingerprint import weights_fingerprint
from piflow.storage.whole import known_hashes, whole_hashes
from piflow.training.preflight import _absolute
from tests.hub import COMMIT, LATER_COMMIT, TOKEN, Hub


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
    with pytest.raises(ValueError, match=r"read-only; write to a local path or an object store"):
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


@pytest.fixture
def moved(hub: Hub, tmp_path: Path) -> Hub:
    """The model's branch gets another commit, with other weights."""
    from safetensors.torch import load_file, save_file

    later = Path(shutil.copytree(tmp_path / "model", tmp_path / "later"))
    file = later / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    hub.later["models/lab/flux"] = later
    return hub


def test_a_place_is_kept_at_its_commit(hub: Hub, moved: Hub) -> None:
    base = "hf://lab/flux/transformer"
    moved.later.clear()
    place = storage.at_commit(base)
    assert place == f"hf://lab/flux@{COMMIT}/transformer" == storage.at_commit(place)
    assert storage.commit_of(place) == COMMIT and storage.commit_of(base) is None
    before = weights_fingerprint(storage.for_ranges(place))
    moved.later["models/lab/flux"] = hub.folders["models/lab/flux"].parent / "later"
    assert storage.at_commit(base) == f"hf://lab/flux@{LATER_COMMIT}/transformer"
    assert storage.at_commit(base, COMMIT) == place
    assert weights_fingerprint(storage.for_ranges(place)) == before
    assert weights_fingerprint(storage.for_ranges(base)) != before
    assert storage.at_commit("/a/b", COMMIT) == "/a/b" and storage.commit_of("/a/b") is None


def test_a_commit_is_known_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    storage.local_folder("hf://lab/flux/vae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert storage.at_commit("hf://lab/flux/vae") == f"hf://lab/flux@{COMMIT}/vae"
    with pytest.raises(OSError):
        storage.at_commit("hf://lab/other/vae")


def test_a_revision_that_is_gone_is_told(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="the repository has no such revision"):
        storage.at_commit("hf://lab/flux@v2/transformer")


def test_workers_read_the_commit_that_the_run_began_with(moved: Hub) -> None:
    recipe = parse_recipe(
        {
            "name": "hub",
            "run_dir": "run",
            "model": {"path": "hf://lab/flux/transformer"},
            "encoder": {"path": "package://an.encoder"},
            "embed": {"prompts": "p.txt", "store": "store", "height": 32, "width": 32},
        }
    )
    assert _absolute(recipe, None).model.path == f"hf://lab/flux@{LATER_COMMIT}/transformer"
    assert _absolute(recipe, COMMIT).model.path == f"hf://lab/flux@{COMMIT}/transformer"


def test_whole_files_are_compared_with_the_hubs(hub: Hub) -> None:
    base = f"hf://lab/flux@{COMMIT}/transformer"
    name = "diffusion_pytorch_model.safetensors"
    folder = storage.local_folder(base)
    assert whole_hashes(base) == {name: storage.sha256(str(folder / name))}
    assert known_hashes(base) is None  # its commit says it
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} has sha256 .* in this machine's cache, on the"):
        whole_hashes(base)
