"""Networks are those that the recipe names, and see pictures as their authors have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.config import EvaluationConfig, NetworkConfig
from piflow.evaluation import networks
from piflow.evaluation.networks import Clip, Dinov2, HpsV2, open_instruments, open_network
from piflow.evaluation.references import References
from tests.unit.evaluation.tiny_networks import SIDE, save_clip, save_dinov2, save_pictures

CPU = torch.device("cpu")
PROMPTS = ["a red heart", "x", "a very long prompt " * 20]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture
def images() -> list[Image.Image]:
    numbers = np.random.default_rng(0)
    sizes = [(40, 40, 3), (61, 33, 3), (20, 90, 3)]
    return [Image.fromarray(numbers.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def test_pictures_are_prepared_as_the_library_does(
    clip: dict[str, str], dinov2: dict[str, str], images: list[Image.Image]
) -> None:
    pil_clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    pil_bit = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    crop = {"height": SIDE, "width": SIDE}
    of_clip = pil_clip.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop)
    of_dinov2 = pil_bit.BitImageProcessorPil(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    for network, processor in (
        (Clip(Path(clip["path"]), "it", CPU), of_clip),
        (Dinov2(Path(dinov2["path"]), "it", CPU), of_dinov2),
    ):
        for image in images:
            (expected,) = processor(image, return_tensors="pt").pixel_values
            torch.testing.assert_close(network.prepare(image), expected, atol=1e-5, rtol=0)


def test_features_are_the_models_own(
    clip: dict[str, str], dinov2: dict[str, str], images: list[Image.Image]
) -> None:
    """CLIP's cosines are those of the model's own forward pass, which scales them."""
    from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

    network = Clip(Path(clip["path"]), "it", CPU)
    model = CLIPModel.from_pretrained(clip["path"]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip["path"])
    inputs = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    pixels = torch.stack([network.prepare(image) for image in images])
    with torch.no_grad():
        scaled = model(**inputs, pixel_values=pixels).logits_per_image
        expected = scaled.double() / model.logit_scale.exp()
    unit = [torch.nn.functional.normalize(each, dim=-1) for each in (
        network.pictures(images), network.prompts(PROMPTS)
    )]  # fmt: skip
    torch.testing.assert_close(unit[0] @ unit[1].T, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
    other = Dinov2(Path(dinov2["path"]), "it", CPU)
    pixels = torch.stack([other.prepare(image) for image in images])
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(dinov2["path"]).eval()(pixels).last_hidden_state
    torch.testing.assert_close(other.pictures(images), states[:, 0].double())


def test_features_do_not_depend_on_how_many_pictures_there_are(
    dinov2: dict[str, str], images: list[Image.Image]
) -> None:
    network = Dinov2(Path(dinov2["path"]), "it", CPU)
    many = network.pictures(iter(images * 11))
    assert many.shape == (33, 8)
    torch.testing.assert_close(many[30:], network.pictures(images), atol=1e-5, rtol=1e-5)


def changed(section: dict[str, str], folder: Path, **keys: Any) -> NetworkConfig:
    """A copy of a network's folder, with other keys of config.json."""
    folder.mkdir()
    for file in Path(section["path"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return NetworkConfig(**{**section, "path": str(folder)})


def test_only_the_weights_that_the_recipe_names_are_opened(
    clip: dict[str, str], dinov2: dict[str, str], tmp_path: Path
) -> None:
    opened = open_network("clip", NetworkConfig(**clip))
    other = changed(clip, tmp_path / "a", logit_scale_init_value=1.0)
    assert open_network("clip", other).identity != opened.identity, "its configuration counts"
    with pytest.raises(ValueError, match="networks.clip: .*model_type 'dinov2', expected 'clip'"):
        open_network("clip", NetworkConfig(**dinov2))
    with pytest.raises(ValueError, match="auto_map: .*piflow runs no code"):
        open_network("clip", changed(clip, tmp_path / "b", auto_map={"AutoModel": "x.Y"}))
    wrong = NetworkConfig(**{**clip, "sha256": "ab" * 32})
    with pytest.raises(ValueError, match=f"sha256 is {'ab' * 32}, and .* has {clip['sha256']}"):
        open_network("clip", wrong)
    pickled = changed(dinov2, tmp_path / "c")
    Path(pickled.path, "model.safetensors").rename(tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no model.safetensors: .*pickled weights are never"):
        open_network("dinov2", pickled)
    with pytest.raises(FileNotFoundError):
        open_network("dinov2", NetworkConfig(**{**dinov2, "path": str(tmp_path / "none")}))
    bare = changed(clip, tmp_path / "d")
    for file in (tmp_path / "d").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_network("clip", bare)


def test_hpsv2_sees_whole_pictures_on_black(
    clip: dict[str, str], images: list[Image.Image]
) -> None:
    """The longer side is resized; a strip above and below, or on both sides, stays black."""
    network = HpsV2(Path(clip["path"]), "it", CPU)
    black = Image.new("RGB", (SIDE, SIDE))
    (square, tall, wide), nothing = map(network.prepare, images), network.prepare(black)
    expected = images[0].resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert torch.equal(square, network.prepare(expected))
    inside = images[1].resize((15, SIDE), Image.Resampling.BICUBIC)  # of 33 x 61
    black.paste(inside, (6, 0))
    assert torch.equal(tall, network.prepare(black))
    assert torch.equal(tall[:, :, :6], nothing[:, :, :6])
    assert torch.equal(tall[:, :, 21:], nothing[:, :, 21:])
    assert torch.equal(wide[:, :11], nothing[:, :11])  # of 90 x 20: 6 high
    assert not torch.equal(wide[:, 11:17], nothing[:, 11:17])


def test_a_package_that_is_missing_is_told_before_anything_is_drawn(
    dinov2: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"networks": {"dinov2": dinov2}, "metrics": ["fd_dinov2_teacher"]}
    config = EvaluationConfig(**settings)
    assert open_instruments(config).networks.keys() == {"dinov2"}
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"fd_dinov2_teacher needs .* `pip install 'piflow\[metr"):
        open_instruments(config)
    assert not open_instruments(EvaluationConfig()).networks


def test_references_are_all_pictures_of_a_folder(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "world", 5)
    save_pictures(tmp_path / "world" / "more", 2, seed=1)
    (tmp_path / "world" / "licence.txt").write_text("CC0")
    references = References(folder, 2)
    found = list(references.read())
    assert len(found) == 7 and all(image.mode == "RGB" for image in found)
    before = references.identity
    assert len(before) == 64
    Image.new("L", (9, 9)).save(tmp_path / "world" / "000.jpg")
    list(references.read())
    assert references.identity != before
    with pytest.raises(ValueError, match="holds 7 pictures, expected at least 8"):
        References(folder, 8)
    (tmp_path / "world" / "000.png").write_bytes(b"%!PS-Adobe")
    with pytest.raises(ValueError, match=r"evaluation.references: .*000.png: .*PostScript"):
        list(References(folder, 2).read())
