"""A base on an object store is streamed by ranges: nothing of it is kept on disk."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from piflow import storage
from piflow.backbones import load_backbone, load_empty_backbone
from piflow.config import ModelConfig
from piflow.sharding.weights import fill, missing


def test_a_base_on_s3_is_read_without_a_copy(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    model.save_pretrained(str(tmp_path / "flux"), max_shard_size="20KB")
    uri = storage.join(bucket, f"flux-{uuid.uuid4().hex[:8]}")
    files = sorted((tmp_path / "flux").iterdir())
    assert len(files) > 3, "several files, their index and a config"
    for file in files:
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    weights = [file for file in files if file.suffix == ".safetensors"]
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    backbone, sources = load_empty_backbone(ModelConfig(path=uri, dtype="bfloat16"))
    fill(backbone.module, missing(backbone.module, sources), device="cpu")
    assert not cache.exists()
    expected = load_backbone(ModelConfig(path=str(tmp_path / "flux"), dtype="bfloat16"))
    found = backbone.module.state_dict()
    for name, tensor in expected.module.state_dict().items():
        assert torch.equal(found[name], tensor), name
    storage.delete_file(storage.join(uri, weights[0].name))
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        load_empty_backbone(ModelConfig(path=uri))
