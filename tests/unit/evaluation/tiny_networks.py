"""Small random CLIP and DINOv2, saved as a user's are, and pictures to measure."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from piflow.backbones.tiny import CLIP_TOKENS, clip_config, clip_tokenizer

SIDE = 28  # pixels of the tiny CLIP


def save_clip(folder: Path, seed: int = 0) -> dict[str, str]:
    """Its section of a recipe."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=clip_config(tokenizer, layers=1).to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 14,
        },
        projection_dim=12,
    )
    assert config.text_config.max_position_embeddings == CLIP_TOKENS
    tokenizer.save_pretrained(str(folder))
    return _saved(CLIPModel, config, folder, seed)


def save_dinov2(folder: Path, seed: int = 0) -> dict[str, str]:
    """Its section of a recipe."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=56,
    )
    return _saved(Dinov2Model, config, folder, seed)


def _saved(kind: Any, config: Any, folder: Path, seed: int) -> dict[str, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            if "lambda" in name or ("norm" in name and name.endswith("weight")):
                torch.nn.init.ones_(parameter)  # so that pictures count, not biases alone
    model.save_pretrained(str(folder))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"path": str(folder), "sha256": digest, "licence": "MIT"}


def save_pictures(folder: Path, count: int, seed: int = 0) -> str:
    """A folder of pictures of several sizes and formats."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for number in range(count):
        noise = numbers.integers(0, 56, (20 + number, 30 - number % 3, 3))
        levels = (noise + numbers.integers(0, 200, 3)).astype(np.uint8)
        suffix = "png" if number % 2 else "jpg"
        Image.fromarray(levels).save(folder / f"{number:03d}.{suffix}")
    return str(folder)
