"""What is predicted for the GPUs of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from piflow.planning.hardware import load_table
from piflow.planning.memory import GIB
from piflow.training.prediction import kind_of, predicted, predicted_on
from tests.unit.planning.cases import recipe


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80gb"),
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


def test_metrics_beside_those_that_are_measured(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, "dit", training={"batch_size": 8})
    memory = int(79.2 * GIB)
    found = predicted_on(wanted, "NVIDIA H100 80GB HBM3", memory, 4, 2)
    rate = found["predicted_samples_per_second"] * found["predicted_step_seconds"]
    assert rate == pytest.approx(8) and found["predicted_memory_gib"] > 1
    assert not predicted_on(wanted, "NVIDIA H100 80GB HBM3", memory, 3, 2), "uneven machines"
    lost = wanted.model_copy(
        update={"model": wanted.model.model_copy(update={"path": str(tmp_path / "nowhere")})}
    )
    assert not predicted_on(lost, "NVIDIA H100 80GB HBM3", memory, 2, 2)
    assert not predicted(wanted, torch.device("cpu"), 2, 2)
