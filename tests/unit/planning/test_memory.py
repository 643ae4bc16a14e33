"""The estimate that `runtime.strategy: auto` decides by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from piflow.config import Recipe, parse_recipe
from piflow.planning.memory import (
    GIB,
    SAFE_SHARE,
    ModelSize,
    ReplicaBytes,
    ShardBytes,
    fits,
    replica_bytes,
    shard_bytes,
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
    recomputed = replica_bytes(recipe(runtime={"activation_checkpointing": "full"}), SIZE)
    assert recomputed.activations == 3 * layer * 4 + layer * 68


def test_products_alone_are_kept() -> None:
    layer = 2 * 42 * 16
    selective = replica_bytes(recipe(runtime={"activation_checkpointing": "selective"}), SIZE)
    assert selective.activations == 3 * layer * 40 + layer * 68


def test_an_fp8_teacher_takes_one_weight_at_a_time() -> None:
    size = replace(SIZE, largest=50)
    plain = replica_bytes(recipe(), size)
    fp8 = replica_bytes(recipe(model={"path": "unused", "fp8_teacher": {}}), size)
    assert plain.fp8 == 0 and fp8.total == plain.total + 9 * 50
    assert "fp8" in str(fp8) and "fp8" not in str(plain)


def test_shards_hold_a_part_and_whole_blocks() -> None:
    """Two of three blocks are whole at a time; offloading moves what is kept to the host."""
    whole = replica_bytes(recipe(), SIZE)
    working = 2 * (1000 + 7 * 4) // 3 + whole.activations
    kept = (1000 + 7 * 20) // 4
    assert shard_bytes(recipe(), SIZE, 4) == ShardBytes(working + kept, 0)
    offloaded = recipe(runtime={"offload": "cpu"})
    assert shard_bytes(offloaded, SIZE, 4) == ShardBytes(working, kept)
    grouped = recipe(runtime={"num_workers": 2, "strategy": "fsdp", "shard_size": 2})
    assert shard_bytes(grouped, SIZE, 2) == ShardBytes(working + 2 * kept, 0)
    assert "0.00 GiB of host memory" in str(ShardBytes(1, 1))


def test_fits_up_to_the_safe_share() -> None:
    needed = ReplicaBytes(40 * GIB, 30 * GIB, 15 * GIB)
    assert SAFE_SHARE == 0.85
    assert fits(needed, 100 * GIB)
    assert not fits(needed, 100 * GIB - 2)
