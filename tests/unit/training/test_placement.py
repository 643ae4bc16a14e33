"""Which strategy a recipe gets."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.config import Recipe, parse_recipe
from piflow.planning.memory import GIB, Memory
from piflow.sharding import SingleStrategy
from piflow.training.placement import choose, free_bytes, replica_and_shard, strategy_for

CPU = torch.device("cpu")
FULL = {"lora": None}
PRETRAINING = {"objective": {"type": "flow_matching"}}


def recipe(folder: Path, **changed: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "unused",
        "model": {"path": str(folder / "flux"), "dtype": "bfloat16"},
        "encoder": {"path": "unused"},
        "embed": {"prompts": "p", "store": "s", "height": 16, "width": 16},
        "policy": {"num_gaussians": 3, "logstd_inner_dim": 16},
        "lora": {"rank": 5},
        "runtime": {"num_workers": 2},
    }
    return parse_recipe(tree | changed)


def memory(size: int) -> Memory:
    """So many GiB of frozen weights, half as many for activations."""
    parts = dict.fromkeys((field.name for field in fields(Memory)), 0)
    return Memory(**{**parts, "weights": size * GIB, "activations": size * GIB // 2})


def test_replicas_if_they_fit() -> None:
    needed = memory(60)
    name, reason = choose(needed, 106 * GIB)
    assert name == "ddp"
    assert "90.00 GiB" in reason and "fits in 85% of the 106.00 GiB" in reason
    name, reason = choose(needed, 105 * GIB)
    assert name == "fsdp" and "doesn't fit in 85% of the 105.00 GiB" in reason


@pytest.mark.parametrize("changed", [{}, FULL, PRETRAINING])
def test_a_replica_and_a_shard(folder: Path, changed: dict[str, Any]) -> None:
    """Of two workers: each holds half of what is split, and the same work."""
    before = torch.random.get_rng_state()
    model, whole, part = replica_and_shard(recipe(folder, **changed), 2)
    assert torch.equal(torch.random.get_rng_state(), before), "measuring must not draw"
    assert whole.weights == model.base_bytes and whole.optimizer == 8 * model.trained
    assert part.weights == -(-model.base_bytes // 2) and part.optimizer == 4 * model.trained
    assert part.activations == whole.activations > 0 and part.gathered > whole.gathered == 0


def test_the_cpus_memory_is_shared_by_its_workers() -> None:
    assert free_bytes(CPU, 4) == pytest.approx(free_bytes(CPU, 1) / 4, rel=1e-6)


def test_one_worker_needs_no_choice(folder: Path) -> None:
    placed = strategy_for(recipe(folder), 1, CPU)
    assert isinstance(placed.strategy, SingleStrategy)
    assert placed.reasons == ("single: there is one worker",) and placed.recipe == recipe(folder)


def test_a_model_that_cannot_be_counted_is_trained_in_the_least_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(recipe: Recipe) -> None:
        raise RuntimeError("no such operation on meta")

    monkeypatch.setattr("piflow.training.placement.measure", fails)
    model = {"path": str(folder / "flux"), "dtype": "bfloat16", "fp8_teacher": {}}
    placed = strategy_for(recipe(folder, model=model), 1, CPU)
    assert placed.recipe.model.fp8_teacher is not None
    assert placed.recipe.model.fp8_teacher.keep_weights is False
    assert "the model can't be measured: no such operation on meta" in placed.reasons[1]


def test_auto_without_process_group(folder: Path) -> None:
    with pytest.raises(ValueError, match="strategy auto with several workers needs a process"):
        strategy_for(recipe(folder), 2, CPU)
