"""Small models of every family, as recipes that name a config.json and as real trios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from piflow.backbones import Conditioning, family_class
from piflow.config import Recipe, parse_recipe
from piflow.planning.model import clock_of
from piflow.planning.sizes import latent_size
from piflow.roles.trio import Trio
from tests.unit.models import MODELS

HEADS = {"attention_head_dim": 16, "num_attention_heads": 4, "num_layers": 6}
TEXT = {"joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6]}
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {**TEXT, "num_single_layers": 5},
    "flux2": {"joint_attention_dim": 24, "axes_dims_rope": [4, 4, 4, 4], "num_single_layers": 5},
    "qwen_image": TEXT,
    "sd3": {"joint_attention_dim": 24, "caption_projection_dim": 64, "pos_embed_max_size": 16},
    "dit": {"sample_size": 16},
}
SIDE, TOKENS = 32, 8  # pixels of a picture; tokens of a prompt


def config(family: str) -> dict[str, Any]:
    """A family's: blocks enough to be alike, channels enough for them to count."""
    return {**MODELS[family][1], **HEADS, **CONFIGS[family]}


def recipe(folder: Path, family: str, **changed: Any) -> Recipe:
    """A distillation of the family's small model, whose config.json is written to the folder."""
    model_class, _ = MODELS[family]
    (folder / family).mkdir(exist_ok=True)
    content = {"_class_name": model_class.__name__, **config(family)}
    (folder / family / "config.json").write_text(json.dumps(content))
    encoder: dict[str, Any] = {"type": "bert", "path": "unused", "max_tokens": TOKENS}
    if family == "dit":
        encoder = {"type": "class_label", "num_classes": 10}
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "unused",
        "model": {"family": family, "path": str(folder / family)},
        "encoder": encoder,
        "embed": {"prompts": "p", "store": "s", "height": SIDE, "width": SIDE},
        "policy": {"num_gaussians": 2, "logstd_inner_dim": 16},
        "lora": {"rank": 8},
        "objective": {"num_intermediate_states": 2, "total_substeps": 32},
        "training": {"batch_size": 4, "micro_batch_size": 2},
    }
    for key, value in changed.items():
        own = tree.get(key)
        tree[key] = {**own, **value} if isinstance(own, dict) and value is not None else value
    return parse_recipe(tree)


def real(wanted: Recipe) -> tuple[Trio, torch.Tensor, Conditioning]:
    """The recipe's trio with values on the CPU, and a micro-batch for it."""
    family = wanted.model.family
    torch.manual_seed(0)
    backbone: Any = family_class(family)(MODELS[family][0](**config(family)))  # type: ignore[call-arg]
    cond = backbone.blank_conditioning(wanted.encoder.text_tokens)
    batch = wanted.training.micro_batch_size
    x = torch.randn(batch, backbone.latent_channels, *latent_size(wanted))
    trio = Trio.from_backbone(
        backbone,
        wanted.lora,
        wanted.policy,
        clock_of(wanted),
        generator=torch.Generator().manual_seed(0),
    )
    return trio, x, cond.select(torch.zeros(batch, dtype=torch.long))
