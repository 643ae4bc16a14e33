"""A tiny FLUX on disk and inputs for it, shared by the model tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def flux_config() -> dict[str, Any]:
    return {
        "in_channels": 48,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 6,
        "pooled_projection_dim": 5,
        "axes_dims_rope": [2, 2, 4],
    }


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory, flux_config: dict[str, Any]) -> Path:
    import torch
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("flux")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**flux_config)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def flux_inputs() -> tuple[Any, Any, Any]:
    """Latents (3, 12, 4, 8), sigma (3,), Conditioning of three prompts of 4 tokens."""
    import torch

    from piflow.backbones import Conditioning

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 12, 4, 8, generator=generator)
    sigma = torch.tensor([1.0, 0.6, 0.2])
    cond = Conditioning(
        torch.randn(3, 4, 6, generator=generator),
        torch.full((3,), 4),
        torch.randn(3, 5, generator=generator),
    )
    return x, sigma, cond
