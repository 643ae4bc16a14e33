"""Which strategy a recipe gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones.flux.fresh import fresh_backbone
from piflow.config import Recipe, parse_recipe
from piflow.planning.memory import GIB, ModelSize, ReplicaBytes
from piflow.sharding import SingleStrategy
from piflow.training.build import build_trio
from piflow.training.placement import choose, free_bytes, measure, strategy_for

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


def test_sizes_of_an_adapter_are_those_of_the_trio(folder: Path) -> None:
    """Counted on the trio that training makes; the base in bfloat16."""
    trio = build_trio(recipe(folder))
    own = [*trio.trainable_parameters().values(), *trio.ema_parameters().values()]
    everything = sum(p.nbytes for module in trio.modules for p in module.parameters())
    expected = ModelSize(
        frozen_bytes=everything - sum(p.nbytes for p in own),
        trained=sum(p.numel() for p in trio.trainable_parameters().values()),
        blocks=3,
        width=16,
        largest=max(p.numel() for p in trio.backbone.module.parameters()),
    )
    assert measure(recipe(folder)) == expected


def test_sizes_of_full_training(folder: Path) -> None:
    """The teacher stays in bfloat16; the output layer is counted, though the head replaces it."""
    trio = build_trio(recipe(folder, **FULL))
    teacher = list(trio.modules[0].parameters())
    output = sum(p.numel() for p in trio.modules[0].get_submodule("norm_out").parameters())
    output += sum(p.numel() for p in trio.modules[0].get_submodule("proj_out").parameters())
    size = measure(recipe(folder, **FULL))
    assert size.frozen_bytes == sum(p.nbytes for p in teacher)
    trained = sum(p.numel() for p in trio.trainable_parameters().values())
    assert trained <= size.trained <= trained + output


def test_sizes_of_pretraining(folder: Path) -> None:
    pretraining = recipe(folder, **PRETRAINING)
    before = torch.random.get_rng_state()
    size = measure(pretraining)
    assert torch.equal(torch.random.get_rng_state(), before), "measuring must not draw"
    fresh = fresh_backbone(pretraining.model, 0)
    numel = sum(p.numel() for p in fresh.module.parameters())
    assert size == ModelSize(0, numel, blocks=3, width=16)


def test_replicas_if_they_fit() -> None:
    needed = ReplicaBytes(40 * GIB, 30 * GIB, 15 * GIB)
    name, reason = choose(needed, 101 * GIB)
    assert name == "ddp"
    assert "85.00 GiB" in reason and "fits in 85% of the 101.00 GiB" in reason
    name, reason = choose(needed, 99 * GIB)
    assert name == "fsdp" and "doesn't fit in 85% of the 99.00 GiB" in reason


def test_the_cpus_memory_is_shared_by_its_workers() -> None:
    assert free_bytes(CPU, 4) == pytest.approx(free_bytes(CPU, 1) / 4, rel=1e-6)


def test_one_worker_needs_no_choice(folder: Path) -> None:
    strategy, reason = strategy_for(recipe(folder), 1, CPU)
    assert isinstance(strategy, SingleStrategy) and "one worker" in reason


def test_auto_without_process_group(folder: Path) -> None:
    with pytest.raises(ValueError, match="strategy auto with several workers needs a process"):
        strategy_for(recipe(folder), 2, CPU)
