"""The estimate that `runtime.strategy: auto` decides by."""

from __future__ import annotations

from typing import Any

import pytest

from piflow.config import Recipe, parse_recipe
from piflow.sharding.memory import (
    GIB,
    SAFE_SHARE,
    ModelSize,
    ReplicaBytes,
    fits,
    replica_bytes,
    tokens_of,
)

SIZE = ModelSize(frozen_bytes=1000, trained=7, blocks=3, width=16)


def recipe(**changed: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "unused",
        "model": {"path": "unused"},
        "encoder": {"path": "unused", "max_tokens": 10},
        "embed": {"prompts": "p", "store": "s", "height": 32, "width": 16},
        "training": {"batch_size": 4, "micro_batch_size": 2},
    }
    return parse_recipe(tree | changed)


def test_tokens_are_patches_and_prompt() -> None:
    """2x2 patches of latents that are 2 (pixels) or 8 (VAE) times smaller than the picture."""
    embed = {"prompts": "p", "store": "s", "height": 32, "width": 16}
    assert tokens_of(recipe()) == 8 * 4 + 10
    assert tokens_of(recipe(model={"path": "p", "codec": "vae"})) == 2 * 1 + 10
    buckets = {**embed, "buckets": [[64, 16], [32, 32], [8, 8]]}
    assert tokens_of(recipe(embed=buckets)) == 16 * 4 + 10


def test_a_class_is_no_token() -> None:
    labels = recipe(
        model={"path": "p", "family": "dit"}, encoder={"type": "class_label", "num_classes": 10}
    )
    assert tokens_of(labels) == 8 * 4


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 8), ("adamw8bit", 2)])
def test_trained_weights_count_with_all_their_copies(optimizer: str, moments: int) -> None:
    training = {"batch_size": 4, "micro_batch_size": 2, "optimizer": {"type": optimizer}}
    needed = replica_bytes(recipe(training=training), SIZE)
    assert needed.frozen == 1000
    assert needed.trained == 7 * (4 + 4 + 4 + moments)
    assert needed.total == needed.frozen + needed.trained + needed.activations


def test_recomputed_blocks_keep_their_input() -> None:
    layer = 2 * 42 * 16  # samples, tokens, channels
    assert replica_bytes(recipe(), SIZE).activations == 3 * layer * 68
    training = {"batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": True}
    recomputed = replica_bytes(recipe(training=training), SIZE)
    assert recomputed.activations == 3 * layer * 4 + layer * 68


def test_fits_up_to_the_safe_share() -> None:
    needed = ReplicaBytes(40 * GIB, 30 * GIB, 15 * GIB)
    assert SAFE_SHARE == 0.85
    assert fits(needed, 100 * GIB)
    assert not fits(needed, 100 * GIB - 2)
