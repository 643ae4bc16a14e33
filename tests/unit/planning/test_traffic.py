"""What the workers send one another, against what they do send."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from piflow.planning.memory import Placement, keeping_codes
from piflow.planning.model import backbone_of, model_of
from piflow.planning.traffic import Collective, traffic
from tests.unit.planning import traffic_ranks as RANKS

SCRIPT = Path(__file__).with_name("traffic_ranks.py")


def test_a_ring_sends_all_but_its_own_part() -> None:
    assert Collective("all-gather", "student", 80, 4).sent == 60
    assert Collective("reduce-scatter", "backward", 80, 4).sent == 60
    assert Collective("all-reduce", "step", 80, 4).sent == 120


@pytest.mark.parametrize(
    ("name", "gathered", "scattered", "reduced"),
    [("ddp", False, False, True), ("fsdp", True, True, False), ("hsdp", True, True, True)],
)
def test_kinds_of_collectives(
    name: str, gathered: bool, scattered: bool, reduced: bool, folder: Path
) -> None:
    kinds = predicted(name, folder, 4)
    assert (kinds["all-gather"] > 0, kinds["reduce-scatter"] > 0) == (gathered, scattered)
    assert (kinds["all-reduce"] > 0) == reduced


def test_blocks_that_stay_whole_are_gathered_less(folder: Path) -> None:
    again, whole = (
        predicted(name, folder, 2)["all-gather"] for name in ("fsdp", "fsdp, blocks stay whole")
    )
    assert 0.2 * again < whole < 0.5 * again


def test_an_8_bit_teachers_weights_are_gathered_in_8_bits(folder: Path) -> None:
    """Codes and a float32 scale a row, in place of each weight; for the teacher's calls alone."""
    run = RANKS.RUNS["fsdp, 8-bit weights"]
    kept = RANKS.traffic_recipe(run, folder)
    model = model_of(kept, *backbone_of(kept))
    sent = [
        {c.phase: c.nbytes for c in traffic(wanted, model, Placement("fsdp", 2, 2))}
        for wanted in (kept, keeping_codes(kept, False))
    ]
    names = {weight.shape for weight in model.coded}
    assert (16, 16) in names and (96, 16) not in names, "not the norms', which see one vector"
    saved = sum(weight.nbytes - weight.numel - 4 * weight.shape[0] for weight in model.coded)
    rounds = 2 * RANKS.MICRO_BATCHES // 2
    assert sent[1]["teacher"] - sent[0]["teacher"] == 3 * rounds * saved > 0
    assert sent[0]["student"] == sent[1]["student"]


def predicted(name: str, folder: Path, world: int) -> Counter[str]:
    """Kind -> bytes of whole tensors in a step."""
    run = RANKS.RUNS[name]
    recipe = RANKS.traffic_recipe(run, folder)
    model = model_of(recipe, *backbone_of(recipe))
    shard = recipe.runtime.shard_size or world
    kinds: Counter[str] = Counter()
    placement = Placement("ddp" if name == "ddp" else "fsdp", world, shard)
    for collective in traffic(recipe, model, placement):
        kinds[collective.kind] += collective.nbytes
    return kinds


@pytest.mark.slow_runs
@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_are_those_that_processes_send(
    processes: int, folder: Path, run_ranks: Callable[..., None]
) -> None:
    """To the byte, by kind: weights gathered, gradients scattered and added up."""
    run_ranks(SCRIPT, folder, processes, timeout=600)
    sent = json.loads((folder / f"traffic-{processes}.json").read_text())
    assert sent
    for name, kinds in sent.items():
        assert dict(predicted(name, folder, processes)) == kinds, name
