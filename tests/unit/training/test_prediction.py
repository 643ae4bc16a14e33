"""What is predicted for the workers of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.planning.hardware import load_table
from piflow.planning.memory import GIB, Placement
from piflow.planning.plan import Planner, on_machines
from piflow.planning.speed import Machines
from piflow.runs.predicted import Workers
from piflow.training import prediction
from piflow.training.placement import Placed
from piflow.training.prediction import kind_of, predict, workers_of
from tests.unit.planning.cases import recipe

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        (H100, 79.2, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.2, "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80gb"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA H100 NVL", 93.1, None),
        ("Tesla T4", 15.0, None),
    ],
)
def test_gpus_by_what_they_call_themselves(name: str, gib: float, kind: str | None) -> None:
    assert kind_of(name, int(gib * GIB), load_table()) == kind


class Counted:
    """Four workers on two machines with GPUs, whose model is counted once for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wanted = recipe(
            folder,
            "dit",
            training={"batch_size": 8},
            runtime={
                "strategy": "fsdp",
                "num_workers": 4,
                "shard_size": 2,
                "reshard_after_forward": True,
            },
        )
        self.planner = Planner(self.wanted, load_table())

    def workers(self, **changed: Any) -> Workers:
        strategy: Any = None
        placed = Placed(strategy, self.wanted, Placement("fsdp", 4, 2), ("because",))
        return replace(workers_of(placed, torch.device("cpu"), here=2, start=3), **changed)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    return Counted(tmp_path_factory.mktemp("model"))


@pytest.fixture
def _counts_once(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "Planner", lambda *_, **__: counted.planner)


@pytest.mark.usefixtures("_counts_once")
def test_a_gpu_of_the_table_gets_what_the_planner_says(counted: Counted) -> None:
    found = predict(counted.workers(device=H100, device_memory=int(79.2 * GIB)))
    machines = Machines("h100-80gb", load_table().gpu("h100-80gb"), 2, 2)
    plan = counted.planner.plan(machines, recipe=on_machines(counted.wanted, 2, 2))
    assert found.step_seconds == plan.speed.step and found.no_time is None
    assert sum(found.memory.values()) == plan.memory.own and found.strategy == "hsdp(2)"
    assert found.reasons == ["because"]
    assert sum(found.sent.values()) == sum(c.sent for c in plan.traffic) > 0
    assert sum(found.operations.values()) == sum(
        count for kinds in plan.flops.values() for count in kinds.values()
    )
    assert found.metrics()["plan/samples_per_second"] == pytest.approx(8 / plan.speed.step)


@pytest.mark.usefixtures("_counts_once")
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, "the workers compute on CPUs"),
        ({"device": "NVIDIA Foo", "device_memory": GIB}, "no NVIDIA Foo of 1.0 GiB"),
        ({"device": H100, "device_memory": int(79.2 * GIB), "here": 3}, "not evenly"),
        ({"device": "NVIDIA A100-SXM4-80GB", "device_memory": int(79.3 * GIB)}, "peak for float8"),
    ],
)
def test_no_time_is_made_up(changed: dict[str, Any], why: str, counted: Counted) -> None:
    """All else is predicted as for a GPU; the last one can't run the recipe's fp8 teacher."""
    told = counted.workers(**changed)
    if "float8" in why:
        model = {**told.recipe["model"], "fp8_teacher": {"keep_weights": False}}
        told = replace(told, recipe={**told.recipe, "model": model})
    found = predict(told)
    assert found.step_seconds is None and why in str(found.no_time)
    assert found.trained > 0 and found.metrics()["plan/tflop_per_step"] > 0
    assert "plan/step_seconds" not in found.metrics()


def test_a_model_that_is_not_there_is_told(counted: Counted, tmp_path: Path) -> None:
    told = counted.workers()
    model = {**told.recipe["model"], "path": str(tmp_path / "nowhere")}
    with pytest.raises((ValueError, OSError), match="nowhere"):
        predict(replace(told, recipe={**told.recipe, "model": model}))
