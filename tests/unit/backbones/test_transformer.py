"""Folders that are loaded, and those that are refused; the same code for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from piflow.backbones import load_backbone
from piflow.config import ModelConfig
from tests.unit.models import MODELS

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(family: str, folder: Path, **save_arguments: Any) -> Any:
    model_class, config = MODELS[family]
    torch.manual_seed(0)
    model = model_class(**config)
    model.save_pretrained(str(folder), **save_arguments)
    return model


def model_config(folder: Path, family: str = "flux", dtype: Any = "float32") -> ModelConfig:
    return ModelConfig(family=family, path=str(folder), dtype=dtype)


def edit(folder: Path, change: Any) -> None:
    """Rewrites the folder's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(family: str, dtype: str, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    backbone = load_backbone(model_config(tmp_path, family, dtype))
    assert backbone.class_name == type(model).__name__
    assert backbone.dtype == getattr(torch, dtype)
    assert {p.dtype for p in backbone.module.parameters()} == {backbone.dtype}
    assert (backbone.width, backbone.latent_channels) == (16, 4)
    assert not backbone.module.training
    assert backbone.config["num_layers"] == 2
    loaded = backbone.module.state_dict()
    kept = [name for name in model.state_dict() if name in loaded and "proj_out" not in name]
    assert len(kept) > 10
    for name in kept:
        assert torch.equal(loaded[name], model.state_dict()[name].to(backbone.dtype))


def test_sharded_weights(tmp_path: Path) -> None:
    model = save("flux", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_backbone(model_config(tmp_path)).module.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model-00002-of"):
        load_backbone(model_config(tmp_path))


@pytest.mark.parametrize("family", MODELS)
def test_folders_of_another_class(family: str, tmp_path: Path) -> None:
    name = MODELS[family][0].__name__
    with pytest.raises(
        ValueError, match=f"has no config.json: give the folder of a diffusers {name}"
    ):
        load_backbone(model_config(tmp_path, family))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=f"expected a {name}, config.json says 'UNet2DModel'"):
        load_backbone(model_config(tmp_path, family))


def test_folder_without_weights(tmp_path: Path) -> None:
    save("flux", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        load_backbone(model_config(tmp_path))


def test_missing_weights_are_named_and_not_made_up(tmp_path: Path) -> None:
    """diffusers alone would go on with random ones."""
    save("flux", tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("proj_out.weight"))
    with pytest.raises(ValueError, match=r"1 tensors are missing \(proj_out.weight\)"):
        load_backbone(model_config(tmp_path))


def test_the_first_few_differences_are_named(tmp_path: Path) -> None:
    save("flux", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_single_layers": 0, "joint_attention_dim": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_backbone(model_config(tmp_path))
    message = str(error.value)
    assert "config.json and weights don't belong together" in message
    assert "aren't the model's (single_transformer_blocks.0." in message and ", …)" in message
    assert "1 have another shape (context_embedder.weight (16, 6) instead of (16, 7))" in message


def test_a_config_that_is_refused_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    save("flux", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="takes none"):
        load_backbone(model_config(tmp_path), embedded_guidance=3.5)
