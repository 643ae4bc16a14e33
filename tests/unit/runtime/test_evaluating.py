"""An evaluation's worker draws its checkpoint's average, tells what can't be cured, stops early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
import torch

from piflow.config import DeepSpeedConfig, Recipe, RuntimeConfig, parse_recipe
from piflow.data.reader import EmbeddingStore
from piflow.evaluation.compare import measure
from piflow.evaluation.drawing import Drawing, Plan
from piflow.runtime.evaluating import _runtime, evaluation_recipe, evaluation_worker
from piflow.runtime.mailbox import Failure, Mailbox, StopReason
from piflow.sharding.single import SingleStrategy
from piflow.training.export import student_of_checkpoint
from tests.unit.inference.test_settings import trained

NAMES = [f"prompt {number}" for number in range(4)]


@pytest.fixture(scope="module")
def store(make_flux_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    return make_flux_store(NAMES, height=16, width=8)


@pytest.fixture
def ours(store: EmbeddingStore, flux_folder: Path, tmp_path: Path) -> Recipe:
    (tmp_path / "run.json").write_text("{}")
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": str(tmp_path),
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "unused", "max_tokens": 4},
            "embed": {"prompts": "p.txt", "store": store.uri, "height": 16, "width": 8},
            "objective": {"type": "pi_id", "nfe": 2, "total_substeps": 16},
            "guidance": {"scale": 2.0},
            "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
            "lora": {"rank": 4},
            "evaluation": {
                "prompts": 2, "seeds": 2, "teacher_steps": 5, "batch_size": 3, "workers": 1,
            },
        }
    )  # fmt: skip


class Handle:
    """A mailbox in this process that is called as through its Ray handle."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.mailbox, name))


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """One worker without Ray: everything remote is answered at once."""
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda values, timeout: (values, []))
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    return Handle()


def work(ours: Recipe, store: EmbeddingStore, folder: Path, handle: Handle) -> dict[str, Any]:
    plan = Plan.of(ours, store, str(folder / "pictures"), "c")
    return {
        "recipe": ours.model_dump(mode="json"),
        "plan": asdict(plan),
        "checkpoint": str(folder / "checkpoint"),
        "store": store,
        "mailbox": handle,
    }


def test_a_worker_draws_the_checkpoints_average(
    ours: Recipe, store: EmbeddingStore, flux_inputs: Any, tmp_path: Path, handle: Handle
) -> None:
    folder, _ = trained(ours, flux_inputs, tmp_path / "checkpoint")
    evaluation_worker(work(ours, store, tmp_path, handle))
    departure = handle.mailbox.departure()
    assert departure.failure is None and departure.reason is StopReason.NONE
    assert departure.step == 4 * 4 and handle.mailbox.read()[0] == 16
    drawn = measure(Drawing(ours, Plan.of(ours, store, str(tmp_path / "pictures"), "c"), store))
    alone = Drawing(ours, Plan.of(ours, store, str(tmp_path / "alone"), "c"), store)
    averaged, _ = student_of_checkpoint(ours, str(folder), "ema")
    alone.draw(averaged, SingleStrategy(torch.device("cpu")))
    expected = measure(alone)
    assert drawn.psnr_gain == expected.psnr_gain and drawn.per_prompt == expected.per_prompt
    assert all(torch.equal(drawn.pictures[name], expected.pictures[name]) for name in drawn.files)


def test_a_worker_that_is_asked_to_end_stops_after_a_round(
    ours: Recipe, store: EmbeddingStore, flux_inputs: Any, tmp_path: Path, handle: Handle
) -> None:
    trained(ours, flux_inputs, tmp_path / "checkpoint")
    handle.mailbox.ask_to_stop(StopReason.END)
    evaluation_worker(work(ours, store, tmp_path, handle))
    departure = handle.mailbox.departure()
    assert (departure.reason, departure.step) == (StopReason.END, 3)
    rest = Drawing(ours, Plan.of(ours, store, str(tmp_path / "pictures"), "c"), store)
    assert rest.num_missing() == 13


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("rank", "doesn't fit this model: ema"),
        ("targets", "LoRA target 'nowhere' matches no"),
        ("disk", r"doesn't see .*run.json as the driver does"),
        ("byte", "is damaged"),
    ],
)
def test_what_no_restart_can_cure_goes_to_the_driver(
    wrong: str,
    told: str,
    ours: Recipe,
    store: EmbeddingStore,
    flux_inputs: Any,
    tmp_path: Path,
    handle: Handle,
) -> None:
    trained(ours, flux_inputs, tmp_path / "checkpoint")
    assert ours.lora is not None
    lora = {"rank": {"rank": 3}, "targets": {"targets": ["nowhere"]}}.get(wrong, {})
    changed = ours.model_copy(update={"lora": ours.lora.model_copy(update=lora)})
    if wrong == "disk":
        (tmp_path / "run.json").unlink()
    if wrong == "byte":
        shard = tmp_path / "checkpoint" / "__0_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    evaluation_worker(work(changed, store, tmp_path, handle))
    failure = handle.mailbox.failure()
    assert isinstance(failure, Failure) and failure.kind == "recipe"
    with pytest.raises(ValueError, match=told):
        raise ValueError(failure.message)
    assert not (tmp_path / "pictures").exists()
    evaluation_worker({"mailbox": handle})  # a restart leaves at once


@pytest.mark.parametrize(
    ("training", "evaluation"),
    [
        ({"strategy": "fsdp", "shard_size": 4, "num_workers": 8}, ("fsdp", None, "none")),
        ({"strategy": "fsdp", "shard_size": 2, "num_workers": 8}, ("fsdp", 2, "none")),
        ({"strategy": "fsdp", "offload": "cpu"}, ("fsdp", None, "cpu")),
        ({"strategy": "ddp"}, ("ddp", None, "none")),
        ({"strategy": "single"}, ("auto", None, "none")),
        ({"strategy": "deepspeed", "num_workers": 8}, ("auto", None, "none")),
        (
            {
                "strategy": "deepspeed",
                "deepspeed": DeepSpeedConfig(stage=3, offload_parameters="cpu"),
            },
            ("fsdp", None, "cpu"),
        ),
    ],
)
def test_the_base_is_spread_as_in_training(
    training: dict[str, Any], evaluation: tuple[str, int | None, str]
) -> None:
    """On six workers; and nothing is kept whole for a backward pass that never comes."""
    compiled = training["strategy"] != "deepspeed"
    runtime = _runtime(RuntimeConfig(**training, compile=compiled), 6)
    assert (runtime.strategy, runtime.shard_size, runtime.offload) == evaluation
    assert runtime.worker_range == (6, 6) and runtime.reshard_after_forward
    assert not runtime.compile and not runtime.uses_deepspeed
    RuntimeConfig.model_validate(runtime.model_dump())


def test_workers_are_by_default_what_training_starts_with(ours: Recipe) -> None:
    def by_default(**runtime: Any) -> int:
        tree = ours.model_dump(mode="json")
        tree["evaluation"]["workers"] = None
        tree["training"]["batch_size"] = 64
        return parse_recipe({**tree, "runtime": runtime}).evaluation_workers

    assert by_default(num_workers=4) == 0
    assert by_default(num_workers=4, use_gpu=True) == 4
    assert by_default(num_workers=[2, 8], use_gpu=True) == 2
    assert ours.evaluation_workers == 1 and evaluation_recipe(ours).runtime.max_workers == 1
