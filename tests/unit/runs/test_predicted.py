"""What a run's folder keeps of a prediction and of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piflow.runs.predicted import GIB, Measured, Prediction, kept_table, page, table, write

PREDICTION = Prediction(
    device="NVIDIA H100 80GB HBM3",
    workers=8,
    strategy="fsdp",
    start=100,
    parameters=11_901_408_320,
    trained=1_000_000,
    memory={"weights": 3 * GIB, "lora": GIB},
    host=0,
    operations={"student": 2 * 10**12, "teacher": 10**12},
    sent={"all-gather, student": 5 * 10**9},
    batch=16,
    step_seconds=2.0,
    reasons=["fsdp: runtime.strategy says so", "a | <b>"],
)
MEASURED = Measured(steps=49, step_seconds=2.5, trained=1_000_000, peak_memory=5 * GIB)


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {name: values for name, *values in cells}


def test_predicted_measured_and_their_ratio() -> None:
    found = rows(table(PREDICTION, MEASURED))
    assert found["8 × NVIDIA H100 80GB HBM3, fsdp"] == ["predicted", "measured", "ratio"]
    assert found["seconds a step"] == ["2", "2.5", "1.25"]
    assert found["samples a second"] == ["8", "6.4", "0.80"]
    assert found["peak memory of PyTorch, GiB"] == ["4", "5", "1.25"]
    assert found["trained parameters"] == ["1,000,000", "1,000,000", "1.00"]
    assert found["TFLOP a step"] == ["3", "–", "–"]


def test_what_is_not_known_is_not_made_up() -> None:
    """On a CPU: no time is predicted, no memory measured."""
    told = {**vars(PREDICTION), "device": "CPU", "step_seconds": None, "no_time": "a | <b>"}
    cpu = Prediction(**told)
    found = rows(table(cpu, Measured(steps=3, step_seconds=2.5, trained=1_000_000)))
    assert found["seconds a step"] == ["–", "2.5", "–"]
    assert found["peak memory of PyTorch, GiB"] == ["4", "–", "–"]
    assert rows(table(cpu, None))["seconds a step"] == ["–", "–", "–"]
    text = page(cpu, None)
    assert "No time is predicted: a / ‹b>." in text and "Nothing is measured yet." in text


def test_the_page_has_the_parts() -> None:
    found = rows(page(PREDICTION, MEASURED))
    assert found["weights"] == ["3"] and found["teacher"] == ["1"]
    assert found["all-gather, student"] == ["5"]
    text = page(PREDICTION, MEASURED)
    assert "median of 49 steps after step 101" in text
    assert "* fsdp: runtime.strategy says so" in text and "* a / ‹b>" in text


def test_a_folder_keeps_the_table(tmp_path: Path) -> None:
    assert kept_table(str(tmp_path)) == ""
    for measured in (None, MEASURED):
        written = write(str(tmp_path), PREDICTION, measured)
        assert set(written) == {"plan/plan.json", "plan/plan.md"}
        assert kept_table(str(tmp_path)) == table(PREDICTION, measured)


@pytest.mark.parametrize(
    "changed",
    [{"workers": "8"}, {"memory": {"a": -1}}, {"step_seconds": "inf"}, {"other": 1}, {"batch": 0}],
)
def test_a_folder_of_somebody_else_gives_no_table(
    changed: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), PREDICTION, MEASURED)
    place = tmp_path / "plan" / "plan.json"
    tree = json.loads(place.read_text())
    tree["predicted"] |= changed
    place.write_text(json.dumps(tree))
    assert kept_table(str(tmp_path)) == "" and "no plan of piflow's" in caplog.text
