"""What a run tells Prometheus; that it costs nothing, and ends nothing when it fails."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from piflow.planning.hardware import load_table
from piflow.runtime import metrics as module
from piflow.runtime.mailbox import Mailbox
from piflow.runtime.metrics import (
    RANK_0_METRICS,
    RUN_METRICS,
    WORKER_METRICS,
    RunMetrics,
)
from piflow.runtime.worker_metrics import WorkerMetrics
from piflow.training.checkpoint_writer import Saved
from piflow.training.step import StepMetrics

ALL = {**RUN_METRICS, **WORKER_METRICS, **RANK_0_METRICS}
PAGE = Path(__file__).parents[3] / "docs" / "monitoring.md"
CPU = torch.device("cpu")

Values = dict[tuple[str, ...], float]


class Recorded:
    """Stands for Ray's `Counter` and `Gauge`: name and labels' values -> value."""

    values: Values = {}

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
        self.name, self.keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> Recorded:
        self.tags = tags
        return self

    def _key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        tags = self.tags | (tags or {})
        assert set(tags) == set(self.keys)
        return (self.name, *(tags[key] for key in self.keys))

    def set(self, value: float) -> None:
        self.values[self._key(None)] = value

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        key = self._key(tags)
        self.values[key] = self.values.get(key, 0.0) + value


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    monkeypatch.setattr(Recorded, "values", {})
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(module, kind, Recorded)
    return Recorded.values


def test_names_follow_prometheus_conventions() -> None:
    for name, metric in ALL.items():
        assert re.fullmatch(r"piflow_[a-z0-9_]+", name)
        assert (metric.kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|minutes|gib|mb|percent)(_|$)", name), "base units"


def test_gauges_are_set_again_as_long_as_their_holder_lives(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray forgets those that nobody has set for two reports; counters are not counted twice."""
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.01)
    before = threading.enumerate()  # other tests' may not have ended
    metrics = RunMetrics("run", 9)
    metrics.stepped(3)
    [thread] = [
        one for one in set(threading.enumerate()).difference(before) if one.name == "metrics"
    ]
    values.clear()
    end = time.monotonic() + 30
    while ("piflow_step", "run") not in values and time.monotonic() < end:
        time.sleep(0.01)
    assert values[("piflow_step", "run")] == 3
    assert values[("piflow_steps_planned", "run")] == 9
    assert not any("total" in name for name, *_ in values)
    del metrics
    thread.join(30)
    assert not thread.is_alive()


def test_the_page_lists_every_metric_with_its_meaning() -> None:
    rows = re.findall(r"^\| `ray_(piflow_\w+)` \| ([^|]*) \| ([^|]*) \|$", PAGE.read_text(), re.M)
    expected = [
        (name, ", ".join([*labels, *(metric.by or ())[:1]]), metric.meaning)
        for group, labels in (
            (RUN_METRICS, ["run"]),
            (WORKER_METRICS, ["run", "rank"]),
            (RANK_0_METRICS, ["run", "rank"]),
        )
        for name, metric in group.items()
    ]
    assert rows == expected


def test_steps_are_counted_by_part_and_all_of_the_time_is_told(values: Values) -> None:
    worker = WorkerMetrics("r", 1, 0.5, CPU)
    began = time.perf_counter()
    worker.begin()
    time.sleep(0.02)
    worker.lap("data")
    time.sleep(0.03)
    worker.stepped(StepMetrics(0, 1.0, 2.0, 0.1, update_seconds=0.01), images=6, flops=1e9)
    time.sleep(0.01)
    worker.lap("other")
    took = time.perf_counter() - began
    parts = {key[3]: value for key, value in values.items() if "step_seconds" in key[0]}
    assert sum(parts.values()) == pytest.approx(took, abs=1e-3)
    assert parts["data"] >= 0.02 and parts["gradients"] >= 0.02 and parts["other"] >= 0.01
    assert parts["update"] == pytest.approx(0.01)
    assert parts["pictures"] == parts["checkpoint"] == pytest.approx(0)
    assert values["piflow_images_total", "r", "1"] == 6
    assert values["piflow_flops_total", "r", "1"] == 6e9
    assert values["piflow_peak_flops", "r", "1"] == 0.5e12
    assert values["piflow_host_memory_peak_bytes", "r", "1"] > 1e7
    assert not [key for key in values if "loss" in key[0] or "gpu" in key[0]]


def test_rank_0_tells_what_all_agree_on(values: Values) -> None:
    worker = WorkerMetrics("r", 0, None, CPU)
    assert values["piflow_skipped_steps_total", "r", "0"] == pytest.approx(0), (
        "there from the start"
    )
    worker.agreed(StepMetrics(4, 0.5, 2.0, 1e-4))
    worker.skipped()
    worker.saved(Saved(5, 0.1, 3.0))
    worker.teacher_checked(0.01, 0.1)
    told = {key[0].removeprefix("piflow_"): value for key, value in values.items()}
    assert {name: told[name] for name in ("loss", "grad_norm", "learning_rate")} == {
        "loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-4,
    }  # fmt: skip
    assert told["skipped_steps_total"] == 1
    assert (told["checkpoint_step"], told["checkpoint_stall_seconds"]) == (5, 0.1)
    assert told["checkpoint_write_seconds"] == 3.0
    assert (told["fp8_teacher_error"], told["fp8_teacher_error_limit"]) == (0.01, 0.1)
    assert "peak_flops" not in told, "nobody knows this device's"


def test_a_runs_life(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "time", lambda: now)
    run = RunMetrics("r", 100)
    assert values["piflow_workers", "r"] == 0
    assert ("piflow_checkpoint_timestamp_seconds", "r") not in values
    now = 1010.0
    run.started(2)
    assert values["piflow_checkpoint_timestamp_seconds", "r"] == 1010
    assert values["piflow_last_step_timestamp_seconds", "r"] == 1000
    now = 1020.0
    run.stepped(7)
    run.saved()
    now = 1030.0
    run.failed("stall")
    assert values["piflow_workers", "r"] == 0
    assert values["piflow_worker_failures_total", "r", "stall"] == 1
    assert values["piflow_worker_failures_total", "r", "failed"] == pytest.approx(0)
    run.started(1)
    assert values["piflow_worker_starts_total", "r"] == 2
    assert values["piflow_checkpoint_timestamp_seconds", "r"] == 1020, "a restart saves nothing"
    assert values["piflow_step", "r"] == 7 and values["piflow_workers", "r"] == 1
    run.gave_up("non-finite")
    assert values["piflow_given_up_total", "r", "non-finite"] == 1
    assert values["piflow_steps_planned", "r"] == 100


def test_a_job_that_trains_nothing_tells_nothing(values: Values) -> None:
    mailbox = Mailbox()
    mailbox.join(2)
    mailbox.update(1, "half of it")
    mailbox.save_took(1.0)
    mailbox.failed("worker 0 failed: gone", 60.0)
    assert values == {}
    Mailbox("r", 10).update(1, "loss 1")
    assert values["piflow_step", "r"] == 1


def test_a_metric_that_fails_is_told_once_and_ends_nothing(
    values: Values, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = WorkerMetrics("r", 0, None, CPU)

    def refuse(*_: Any) -> None:
        raise RuntimeError("the agent is gone")

    monkeypatch.setattr(Recorded, "set", refuse)
    for _ in range(3):
        worker.stepped(StepMetrics(0, 1.0, 2.0, 0.1), 1, 1e9)
        worker.agreed(StepMetrics(0, 1.0, 2.0, 0.1))
    [record] = caplog.records
    assert "no metrics for Prometheus: RuntimeError: the agent is gone" in record.message


def test_metrics_that_cant_be_made_end_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such kind")

    monkeypatch.setattr(module, "Gauge", refuse)
    run = RunMetrics("r", 100)
    run.started(2)
    run.failed("failed")
    assert len(caplog.records) == 1


def test_an_update_with_rays_own_metrics_needs_no_cluster_and_no_waiting() -> None:
    """Ray's counters and gauges themselves; a loose bound, a busy machine may take its time."""
    worker = WorkerMetrics("r", 0, None, CPU)
    step = StepMetrics(0, 1.0, 2.0, 0.1, update_seconds=1e-6)
    worker.begin()
    began = time.perf_counter()
    for _ in range(200):
        worker.stepped(step, 1, 1e9)
        worker.agreed(step)
    assert (time.perf_counter() - began) / 200 < 5e-3


def test_a_gpus_memory_is_read_from_the_allocators_books(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=80 * 2**30, name="NVIDIA H100 80GB HBM3")
    books = {"allocated_bytes.all.peak": 2**30, "reserved_bytes.all.current": 2**31}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: books)
    worker = WorkerMetrics("r", 1, None, torch.device("cuda", 0))
    worker.stepped(StepMetrics(0, 1.0, 2.0, 0.1), 1, 1e9)
    gpu = {key[0]: value for key, value in values.items() if "gpu" in key[0]}
    assert gpu == {
        "piflow_gpu_memory_total_bytes": 80 * 2**30,
        "piflow_gpu_memory_peak_bytes": 2**30,
        "piflow_gpu_memory_reserved_bytes": 2**31,
    }
    assert values["piflow_peak_flops", "r", "1"] == 989e12


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name: str, expected: float | None) -> None:
    assert load_table().peak_of_device(name) == expected
