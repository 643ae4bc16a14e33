"""Checkpoints: what is saved continues bit for bit, and what doesn't fit is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from piflow import rundir
from piflow.checkpoint import (
    STATE_FILE,
    CheckpointError,
    RunState,
    load_checkpoint,
    load_state,
    load_tensors,
    save_checkpoint,
)
from piflow.config import EMAConfig, OptimizerConfig, TrainingConfig
from piflow.sharding.single import SingleStrategy
from piflow.step import Backward, Trainer

STATE = RunState(3, 12, "0123456789abcdef", "run-id", {"name": "test", "seed": 0})


class Rows:
    """A micro-batch of three random rows."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.prompts = self.prompt_ids = tuple(f"{index}.{row}" for row in range(3))


def make(kind: str = "adamw", width: int = 6, extra: bool = False) -> Trainer:
    """A fresh trainer of a small network, named as a backbone's blocks are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "blocks": nn.Linear(4, width),
            "out": nn.Linear(width, 1),
        }
        if extra:
            layers["more"] = nn.Linear(1, 1)
        network = nn.ModuleDict(layers)

    def objective(batch: Rows, step: int, generator: torch.Generator, backward: Backward) -> Tensor:
        hidden = network["blocks"](torch.randn(3, 4, generator=generator)).tanh()
        output = network["out"](hidden)
        loss = ((network["more"](output) if extra else output) - 1).square().mean()
        backward(loss, True)
        return loss.detach()

    parameters = dict(network.named_parameters())
    return Trainer(
        objective,
        parameters,
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
        SingleStrategy(torch.device("cpu")),
        TrainingConfig(
            steps=10,
            batch_size=6,
            micro_batch_size=3,
            optimizer=OptimizerConfig(type=kind, lr=0.05, warmup_steps=2, weight_decay=0.01),
            ema=EMAConfig(start=1),
        ),
        seed=1,
    )


def train(trainer: Trainer, steps: range) -> list[float]:
    return [trainer.step(step, [Rows(0), Rows(1)]).loss for step in steps]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer = make()
    train(trainer, range(3))
    save_checkpoint(tmp_path / "step_3", trainer, STATE)
    return tmp_path / "step_3"


@pytest.mark.filterwarnings("error:torch.distributed")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_continuation_is_bit_identical(kind: str, tmp_path: Path) -> None:
    whole = make(kind)
    losses = train(whole, range(5))
    first = make(kind)
    early = train(first, range(3))
    save_checkpoint(tmp_path / "step_3", first, STATE)

    resumed = make(kind)
    assert load_checkpoint(tmp_path / "step_3", resumed) == STATE
    assert early + train(resumed, range(3, 5)) == losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name
        assert torch.equal(resumed.ema_parameters[name], whole.ema_parameters[name]), name
    assert not torch.equal(whole.parameters["out.weight"], first.parameters["out.weight"])


def test_loading_keeps_the_trainers_own_tensors(saved: Path) -> None:
    """The optimiser and the model hold references: values are restored in place."""
    trainer = make()
    before = {name: parameter.data_ptr() for name, parameter in trainer.parameters.items()}
    load_checkpoint(saved, trainer)
    assert {name: p.data_ptr() for name, p in trainer.parameters.items()} == before


def test_state_round_trip(saved: Path) -> None:
    assert load_state(saved) == STATE
    assert load_state(saved).recipe == {"name": "test", "seed": 0}


def test_whole_tensors_of_a_section(saved: Path) -> None:
    trainer = make()
    load_checkpoint(saved, trainer)
    ema, trainable = load_tensors(saved, "ema"), load_tensors(saved, "trainable")
    assert list(sorted(ema)) == sorted(trainer.ema_parameters)
    for name, tensor in ema.items():
        assert torch.equal(tensor, trainer.ema_parameters[name])
        assert torch.equal(trainable[name], trainer.parameters[name])
    assert not torch.equal(ema["out.weight"], trainable["out.weight"])
    with pytest.raises(CheckpointError, match="has no section 'teacher'"):
        load_tensors(saved, "teacher")


# ------------------------------------------------------------------------------- what doesn't fit


def test_an_unfinished_checkpoint(saved: Path) -> None:
    (saved / STATE_FILE).unlink()
    for use in (load_state, lambda folder: load_tensors(folder, "ema")):
        with pytest.raises(CheckpointError, match="not a finished checkpoint: it has no state.jso"):
            use(saved)
    with pytest.raises(CheckpointError, match="step_3 is not a finished checkpoint"):
        load_checkpoint(saved, make())


@pytest.mark.parametrize("content", ['{"step": 3, "sam', "{}", "[]", '{"step": 1, "new": 2}'])
def test_a_damaged_state(content: str, saved: Path) -> None:
    (saved / STATE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="state.json is damaged.*use another checkpoint"):
        load_state(saved)


def test_lost_tensors_are_named_as_a_damaged_checkpoint(saved: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match="step_3.*damaged.*use another checkpoint"):
            load_tensors(saved, "ema")
        with pytest.raises(CheckpointError, match="step_3.*damaged.*use another checkpoint"):
            load_checkpoint(saved, make())
        (saved / name).write_bytes(content)
    load_checkpoint(saved, make())


def test_a_file_that_was_cut_short(saved: Path) -> None:
    content = (saved / ".metadata").read_bytes()
    (saved / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="step_3 is damaged.*use another checkpoint"):
        load_checkpoint(saved, make())


def test_another_models_shapes_are_named(saved: Path) -> None:
    trainer = make(width=7)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved, trainer)
    message = str(caught.value)
    assert "trainable.blocks.weight has shape (6, 4), expected (7, 4)" in message
    assert "Resume with the recipe that wrote it" in message
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, before[name])


def test_missing_and_unknown_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it lacks trainable.more.weight"):
        load_checkpoint(saved, make(extra=True))
    larger = make(extra=True)
    train(larger, range(1))
    save_checkpoint(tmp_path / "larger", larger, replace(STATE, step=1))
    with pytest.raises(CheckpointError, match="it has an unknown trainable.more.weight"):
        load_checkpoint(tmp_path / "larger", make())


def test_state_lists_the_files_and_their_sizes(saved: Path) -> None:
    tree = json.loads((saved / STATE_FILE).read_text())
    assert tree["step"] == 3 and tree["recipe_hash"] == "0123456789abcdef"
    found = {path.name: path.stat().st_size for path in saved.iterdir() if path.name != STATE_FILE}
    assert tree["files"] == found and len(found) == 2


def test_run_directory_takes_it_for_finished(saved: Path) -> None:
    run_dir = saved.parent / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    saved.rename(run_dir / "checkpoints" / rundir.checkpoint_name(3))
    assert list(rundir.checkpoints(str(run_dir))) == [3]
