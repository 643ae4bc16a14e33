"""Checkpoints: what is saved continues bit for bit, and what doesn't fit is named."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piflow.config import EMAConfig, OptimizerConfig, Recipe, TrainingConfig, parse_recipe
from piflow.imitation import PartOfLoss
from piflow.runs import folder as run_folder
from piflow.sharding.single import SingleStrategy
from piflow.training.checkpoint import (
    STATE_FILE,
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    RunState,
    load_checkpoint,
    load_state,
    load_tensors,
    require_same_run,
    verify_checkpoint,
)
from piflow.training.preflight import require_newest_of
from piflow.training.snapshot import Snapshot
from piflow.training.step import Trainer
from tests.unit.whole import save_checkpoint

STATE = RunState(3, 12, "0123456789abcdef", "run-id", {"name": "test", "seed": 0})


class Rows:
    """A micro-batch of three random rows."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.prompts = self.prompt_ids = tuple(f"{index}.{row}" for row in range(3))


def make(kind: str = "adamw", width: int = 6, extra: bool = False, features: int = 4) -> Trainer:
    """A fresh trainer of a small network, named as a backbone's blocks are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "blocks": nn.Linear(features, width),
            "out": nn.Linear(width, 1),
        }
        if extra:
            layers["more"] = nn.Linear(1, 1)
        network = nn.ModuleDict(layers)

    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        hidden = network["blocks"](torch.randn(3, features, generator=generator)).tanh()
        output = network["out"](hidden)
        loss = ((network["more"](output) if extra else output) - 1).square().mean()
        yield loss, True

    parameters = dict(network.named_parameters())
    return Trainer(
        SimpleNamespace(losses=losses),
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
@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_continuation_is_bit_identical(kind: str, tmp_path: Path) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    size = {"width": 64, "features": 64} if kind == "adamw8bit" else {}
    whole = make(kind, **size)
    losses = train(whole, range(5))
    first = make(kind, **size)
    early = train(first, range(3))
    save_checkpoint(tmp_path / "step_3", first, STATE)

    resumed = make(kind, **size)
    assert load_checkpoint(tmp_path / "step_3", resumed) == STATE
    assert early + train(resumed, range(3, 5)) == losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name
        assert torch.equal(resumed.ema_parameters[name], whole.ema_parameters[name]), name
    assert not torch.equal(whole.parameters["out.weight"], first.parameters["out.weight"])
    if kind == "adamw8bit":
        names = {type(optimizer).__name__ for optimizer in resumed.optimizers}
        assert names == {"BlockwiseAdamW8bit", "AdamW"}


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


# ------------------------------------------------------------------------- other numbers of workers

SCRIPT = Path(__file__).with_name("resharded_training.py")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resharded_training", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RESHARDED = load_script()
RUNS = [*RESHARDED.STRATEGIES, "adamw8bit"]  # under FSDP2


@pytest.fixture(scope="module")
def resharded(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> dict[Any, dict[str, Any]]:
    """One process saves, two resume, train on, save and resume, one resumes: what each held."""
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("resharded")
    single = SingleStrategy(torch.device("cpu"))
    results: dict[Any, dict[str, Any]] = {}
    for kind in RESHARDED.KINDS:
        trainer = RESHARDED.make(kind, single)
        RESHARDED.train(trainer, 0, RESHARDED.SAVED)
        saved = {name: value.clone() for name, value in RESHARDED.whole_state(trainer).items()}
        save_checkpoint(folder / "one" / kind, trainer, replace(STATE, step=RESHARDED.SAVED))
        losses = RESHARDED.train(trainer, RESHARDED.SAVED, RESHARDED.END)
        end = RESHARDED.whole_state(trainer)
        next_losses = RESHARDED.train(trainer, RESHARDED.END, RESHARDED.END + 1)
        results[kind] = {"one": saved, "losses": losses, "end": end, "next": next_losses}
    run_ranks(SCRIPT, folder)
    there = torch.load(folder / "results.pt", weights_only=True)
    results |= {f"two {key}": value for key, value in there.items()}
    for name in RUNS:
        trainer = RESHARDED.make(kind_of(name), single)
        results["one", name] = RESHARDED.resumed_from(folder / "many" / name, trainer)
    return results


def kind_of(name: str) -> str:
    return "adamw8bit" if name == "adamw8bit" else "adamw"


def assert_equal(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """To the bit, and in the same order."""
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("name", RUNS)
def test_another_number_of_workers_restores_every_tensor_exactly(
    name: str, resharded: dict[Any, dict[str, Any]]
) -> None:
    before, there = resharded[kind_of(name)]["one"], resharded[f"two {name}"]
    assert_equal(there["restored"], before)
    assert_equal(resharded["one", name]["restored"], there["saved"])
    moments = [key for key in before if "exp_avg.codes" in key]
    assert len(moments) == (2 if name == "adamw8bit" else 0)
    assert any(before[key].any() for key in before if "exp_avg" in key)


@pytest.mark.parametrize("name", RUNS)
def test_another_number_of_workers_trains_on_as_before(
    name: str, resharded: dict[Any, dict[str, Any]]
) -> None:
    alone, there = resharded[kind_of(name)], resharded[f"two {name}"]
    assert there["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert resharded["one", name]["losses"] == pytest.approx(alone["next"], rel=1e-5)
    for key in [key for key in alone["end"] if key.startswith("weight ")]:
        way = (alone["end"][key] - alone["one"][key]).norm()
        gap = (there["saved"][key] - alone["end"][key]).norm()
        assert gap < 0.01 * way, key


@pytest.mark.parametrize("after", RESHARDED.STRATEGIES)
@pytest.mark.parametrize("before", RESHARDED.STRATEGIES)
def test_any_strategy_goes_on_from_any_other(
    before: str, after: str, resharded: dict[Any, dict[str, Any]]
) -> None:
    found = resharded[f"two {(before, after)}"]
    assert_equal(found["restored"], resharded[f"two {before}"]["saved"])
    assert found["losses"] == pytest.approx(resharded["adamw"]["next"], rel=1e-5)


@pytest.mark.parametrize("name", RESHARDED.STRATEGIES)
def test_a_step_that_fails_moves_nothing(name: str, resharded: dict[Any, dict[str, Any]]) -> None:
    """A loss of NaN with a finite gradient, on one of the workers; nor does it leave gradients."""
    found = resharded[f"two {(name, name)}"]
    assert_equal(found["untouched"], found["restored"])


# ------------------------------------------------------------------------------- what doesn't fit


@pytest.mark.parametrize(("wrote", "reads"), [("adamw", "muon"), ("adamw8bit", "adamw")])
def test_another_optimisers_state_is_named(wrote: str, reads: str, tmp_path: Path) -> None:
    if wrote == "adamw8bit":
        pytest.importorskip("torchao")
    trainer = make(wrote, width=64, features=64)
    train(trainer, range(2))
    save_checkpoint(tmp_path / "step_2", trainer, replace(STATE, step=2))
    with pytest.raises(CheckpointError, match="an unknown optimizer.blocks.weight.*recipe that wr"):
        load_checkpoint(tmp_path / "step_2", make(reads, width=64, features=64))


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
    for name in ("metadata.json", "__0_0.distcp"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match="step_3.*damaged.*use another checkpoint"):
            load_tensors(saved, "ema")
        with pytest.raises(CheckpointError, match="step_3.*damaged.*use another checkpoint"):
            load_checkpoint(saved, make())
        (saved / name).write_bytes(content)
    load_checkpoint(saved, make())


def test_a_file_that_was_cut_short(saved: Path) -> None:
    content = (saved / "metadata.json").read_bytes()
    (saved / "metadata.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="step_3 is damaged.*use another checkpoint"):
        load_checkpoint(saved, make())


@pytest.mark.parametrize("position", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", ["__0_0.distcp", "metadata.json"])
def test_a_flipped_byte_names_the_file(name: str, position: float, saved: Path) -> None:
    """Sizes are right; nothing is used of it, not even what lies in other files."""
    file = saved / name
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 1
    file.write_bytes(content)
    trainer = make()
    before = {key: parameter.detach().clone() for key, parameter in trainer.parameters.items()}
    expected = f"step_3 is damaged .{name} has sha256 [0-9a-f]{{16}}, expected .*another checkpoint"
    for use in (
        verify_checkpoint,
        lambda folder: load_tensors(folder, "ema"),
        lambda folder: load_checkpoint(folder, trainer),
    ):
        with pytest.raises(DamagedCheckpointError, match=expected):
            use(saved)
    assert all(torch.equal(trainer.parameters[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step": 3', '"step": 2'), ("0123456789abcdef", "1123456789abcdef"), ('d": 0', 'd": 8')],
)
def test_a_state_that_was_changed(old: str, new: str, saved: Path) -> None:
    """It is whole and makes sense: only its own checksum tells."""
    text = (saved / STATE_FILE).read_text()
    assert text.count(old) == 1
    (saved / STATE_FILE).write_text(text.replace(old, new))
    for use in (load_state, verify_checkpoint):
        with pytest.raises(DamagedCheckpointError, match="state.json is damaged.*its checksum is"):
            use(saved)


def test_a_snapshot_is_a_copy(saved: Path) -> None:
    trainer = make()
    load_checkpoint(saved, trainer)
    tensors = Snapshot(trainer).copy()
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    train(trainer, range(3, 5))
    assert all(torch.equal(tensors[name], held[name]) for name in held)
    changed = Snapshot(trainer).copy()
    assert not any(torch.equal(tensors[name], changed[name]) for name in held)


def test_another_models_shapes_are_named(saved: Path) -> None:
    trainer = make(width=7)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved, trainer)
    message = str(caught.value)
    assert "trainable.blocks.weight has shape (6, 4), expected (7, 4)" in message
    assert "Use the recipe that wrote it" in message
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


def test_state_lists_the_files_their_sizes_and_checksums(saved: Path) -> None:
    tree = json.loads((saved / STATE_FILE).read_text())
    assert tree["step"] == 3 and tree["recipe_hash"] == "0123456789abcdef"
    found = {path.name: path.stat().st_size for path in saved.iterdir() if path.name != STATE_FILE}
    assert tree["files"] == found and len(found) == 2
    assert tree["sha256"] == {
        name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in found
    }
    assert verify_checkpoint(saved) == STATE


def recipe(**sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "run_dir": "run",
            "model": {"path": "teacher"},
            "encoder": {"path": "encoder"},
            "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
            **sections,
        }
    )


def state_of(written: Recipe, store: str | None = "ab" * 32) -> RunState:
    identity = written.identity()
    return replace(STATE, recipe_hash=written.hash(), identity=identity, manifest_hash=store)


def test_a_checkpoint_of_this_recipe_and_store_passes() -> None:
    """Those that know no store, or for which none is known, by their recipe alone."""
    ours = recipe()
    for found, store in [("ab" * 32, "ab" * 32), (None, "ab" * 32), ("ab" * 32, None)]:
        require_same_run(state_of(ours, found), ours, store, "here")
    longer = recipe(training={"steps": 99}, runtime={"num_workers": 2})
    require_same_run(state_of(ours), longer, "ab" * 32, "here")
    by_identity = replace(state_of(ours), recipe_hash="of another version")
    require_same_run(by_identity, ours, "ab" * 32, "here")


@pytest.mark.parametrize(
    ("other", "change"),
    [({"seed": 5}, "seed: 0 here, 5 there"),
     ({"training": {"optimizer": {"lr": 0.5}}}, r"training.optimizer.lr: .* here, 0.5 there")],
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_is_refused_with_what_differs(
    other: dict[str, Any], change: str
) -> None:
    with pytest.raises(ForeignCheckpointError, match=change) as caught:
        require_same_run(state_of(recipe(**other)), recipe(), None, "s3://b/step_00000002")
    assert "s3://b/step_00000002 was written by recipe" in str(caught.value)
    old = replace(state_of(recipe(**other)), identity=None, manifest_hash=None)  # 0.1.0's
    with pytest.raises(ForeignCheckpointError, match="use the recipe that wrote it, or move the"):
        require_same_run(old, recipe(), None, "here")


def test_a_checkpoint_of_another_store_is_refused() -> None:
    with pytest.raises(ForeignCheckpointError, match="on store abababababababab.*is cdcdcdcdcdcd"):
        require_same_run(state_of(recipe()), recipe(), "cd" * 32, "here")


def test_nothing_of_a_foreign_checkpoint_is_restored(tmp_path: Path) -> None:
    first, fresh = make(), make()
    train(first, range(1))
    save_checkpoint(tmp_path / "step_1", first, state_of(recipe(seed=5)))
    before = {name: value.detach().clone() for name, value in fresh.parameters.items()}
    with pytest.raises(ForeignCheckpointError):
        load_checkpoint(
            tmp_path / "step_1", fresh, lambda state: require_same_run(state, recipe(), None, "x")
        )
    assert all(torch.equal(fresh.parameters[name], value) for name, value in before.items())


def test_a_start_looks_at_the_newest_checkpoint(tmp_path: Path) -> None:
    """A damaged one is the workers' matter, who go on from the one before."""
    uris = {}
    for step, written in ((1, recipe()), (2, recipe(seed=5))):
        uris[step] = str(tmp_path / f"step_{step}")
        where = replace(state_of(written), step=step)
        save_checkpoint(tmp_path / f"step_{step}", make(), where)
    require_newest_of(recipe(), "ab" * 32, {})
    require_newest_of(recipe(), "ab" * 32, {1: uris[1]})
    with pytest.raises(ForeignCheckpointError, match="step_2 was written by recipe"):
        require_newest_of(recipe(), "ab" * 32, uris)
    (tmp_path / "step_2" / STATE_FILE).write_text("{}")
    require_newest_of(recipe(), "ab" * 32, uris)
    with pytest.raises(ForeignCheckpointError, match="is of step 1, its folder's name says 3"):
        require_newest_of(recipe(), "ab" * 32, {3: uris[1]})


def test_run_directory_takes_it_for_finished(saved: Path) -> None:
    run_dir = saved.parent / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    saved.rename(run_dir / "checkpoints" / run_folder.checkpoint_name(3))
    assert list(run_folder.checkpoints(str(run_dir))) == [3]
