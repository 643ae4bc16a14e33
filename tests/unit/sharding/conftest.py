"""A tiny FLUX folder for training on one and several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=48,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )
    model.save_pretrained(str(folder / "flux"))
    return folder
