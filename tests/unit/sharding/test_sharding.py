"""One process and several processes are the same training, whatever the strategy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from piflow.planning.model import backbone_of, model_of
from piflow.sharding import DDPStrategy, FSDPStrategy, SingleStrategy, build_strategy
from tests.unit.sharding import golden
from tests.unit.sharding import training as TRAINING
from tests.unit.sharding.training import Run

SCRIPT = Path(__file__).with_name("training.py")
ALL_RUNS = [run for runs in TRAINING.RUNS.values() for run in runs]


def every_run(condition: Callable[[Run], bool]) -> pytest.MarkDecorator:
    """Parametrises `run`; slow ones are for `-m slow_runs`."""
    marks = {run: [pytest.mark.slow_runs, pytest.mark.timeout(1800)] for run in TRAINING.SLOW}
    chosen = [run for run in ALL_RUNS if condition(run)]
    parameters = [pytest.param(run, marks=marks.get(run, []), id=name_of(run)) for run in chosen]
    return pytest.mark.parametrize("run", parameters)


def name_of(run: Run) -> str:
    return ", ".join([run.scenario, run.strategy, *run.options])


def is_distillation(run: Run) -> bool:
    return run.scenario in TRAINING.DISTILLATIONS


class Results(dict[Any, Any]):
    """What every run left, by its tuple, and `replica_gradients` and `automatic`.

    All runs of as many processes are done when the first of them is asked for.
    """

    def __init__(self, folder: Path, run_ranks: Callable[..., None]) -> None:
        super().__init__()
        self._folder, self._run_ranks = folder, run_ranks

    def __missing__(self, key: Any) -> Any:
        run = None if isinstance(key, str) else Run(*key)
        world_size = 2 if run is None else TRAINING.world_size(run)
        name = "slow" if run in TRAINING.SLOW else "quick"
        # a meeting that failed leaves its places, at which the next one would wait for ever
        (self._folder / f"rendezvous-{name}-{world_size}").unlink(missing_ok=True)
        timeout = 1700 if name == "slow" else 540
        self._run_ranks(SCRIPT, self._folder, world_size, name, timeout=timeout)
        self.update(torch.load(self._folder / f"{name}-{world_size}.pt", weights_only=True))
        return dict(self)[key]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the ranks: tiny tensors only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def several_processes(folder: Path, run_ranks: Callable[..., None]) -> Results:
    return Results(folder, run_ranks)


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Callable[[str], Any]:
    return cache(lambda scenario: TRAINING.train(TRAINING.Run(scenario, "single"), folder))


@every_run(lambda run: True)
def test_any_run_equals_one_plain_process(
    run: Run, one_process: Callable[[str], Any], several_processes: Results
) -> None:
    """Losses, gradient norms, weights, EMA and what it draws; only the summation order differs."""
    scenario = run.scenario
    one, several = one_process(scenario), several_processes[tuple(run)]
    # a last-bit difference in a LoRA weight may flip a rounding in a bfloat16 forward pass
    tolerance = {TRAINING.LORA_BF16: 5e-4, TRAINING.MUON: 1e-5}.get(scenario, 1e-6)
    # Muon makes all of a gradient's directions equally long, in bfloat16; of a gradient of low rank
    # some are mere rounding, and another order of the same sum already moves weights by 3e-4;
    # a last-bit difference in a moment may flip its 8-bit code
    apart = {TRAINING.MUON: 1e-3, TRAINING.EIGHT_BITS: 1e-4}.get(scenario, tolerance)
    assert one.losses.keys() == several["losses"].keys()
    for key, loss in one.losses.items():
        assert several["losses"][key] == pytest.approx(loss, rel=tolerance)
    assert several["norms"] == pytest.approx(one.norms, rel=tolerance)
    assert min(one.norms) > 0.05, "the clip must have acted for the comparison to cover it"
    for section in ("trained", "ema", "drawn"):
        expected, got = getattr(one, section), several[section]
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                got[name],
                tensor,
                rtol=0,
                atol=apart,
                msg=lambda text, where=f"{section} {name}": f"{where}: {text}",
            )


# Another CPU or library rounds otherwise, and five steps carry that on; weights of nearly equal
# gradients take opposite steps under Muon
GOLDEN_TOLERANCE = {TRAINING.LORA_BF16: 2e-2, TRAINING.FULL: 2e-3, TRAINING.MUON: 2e-2}


@pytest.mark.parametrize("scenario", TRAINING.SCENARIOS)
def test_golden_files_are_of_these_trainings(
    scenario: str, one_process: Callable[[str], Any]
) -> None:
    """Else make them again: `python -m tests.unit.sharding.golden`."""
    kept = json.loads(golden.path_of(scenario).read_text())
    fresh = json.loads(json.dumps(golden.record(scenario, one_process(scenario))))
    assert kept["config"] == fresh["config"]
    tolerance = GOLDEN_TOLERANCE.get(scenario, 1e-4)
    for key in ("losses", "grad_norms"):
        assert np.array(fresh[key]) == pytest.approx(np.array(kept[key]), rel=tolerance)


@every_run(lambda run: True)
def test_any_run_gives_the_golden_losses(run: Run, several_processes: Results) -> None:
    kept = json.loads(golden.path_of(run.scenario).read_text())
    got = several_processes[tuple(run)]
    tolerance = GOLDEN_TOLERANCE.get(run.scenario, 1e-4)
    losses = [got["losses"][key] for key in sorted(got["losses"])]
    assert losses == pytest.approx(np.ravel(kept["losses"]), rel=tolerance)
    assert got["norms"] == pytest.approx(kept["grad_norms"], rel=tolerance)


@every_run(is_distillation)
def test_training_leaves_the_base_alone(run: Run, several_processes: Results) -> None:
    result = several_processes[tuple(run)]
    assert result["base_unchanged"]
    assert result["teacher_unchanged"]
    assert all(tensor.dtype == torch.float32 for tensor in result["trained"].values())


@every_run(lambda run: run.scenario == TRAINING.LORA)
def test_gradients_reach_every_layer(run: Run, several_processes: Results) -> None:
    """LoRA's B starts at 0 and the EMA lags behind: guards against a training that does nothing."""
    result = several_processes[tuple(run)]
    down_projections = [name for name in result["trained"] if name.endswith("lora_B.weight")]
    assert len(down_projections) == 10
    assert all(result["trained"][name].any() for name in down_projections)
    for name, average in result["ema"].items():
        assert not torch.equal(average, result["trained"][name]), name


@every_run(lambda run: run.strategy == "ddp")
def test_replicas_stay_equal(run: Run, several_processes: Results) -> None:
    """To the bit: nothing but gradients is ever sent."""
    assert several_processes[tuple(run)]["replicas_equal"]


@every_run(lambda run: is_distillation(run) and run.strategy != "single")
def test_workers_hold_what_the_estimate_counts(
    run: Run, folder: Path, several_processes: Results
) -> None:
    """All weights of replicas, a part of shards, whose sizes are uneven."""
    recipe = TRAINING.recipe_of(run, folder)
    model = model_of(recipe, *backbone_of(recipe))
    weights = model.base_bytes + 2 * 4 * model.trained  # the student's and the average's
    splits = run.strategy in ("fsdp", "hsdp", "zero3")
    parts = recipe.runtime.shard_size or recipe.runtime.max_workers if splits else 1
    assert several_processes[tuple(run)]["held"] == pytest.approx(weights / parts, rel=0.1)


def test_all_workers_get_the_same_choice(several_processes: Results) -> None:
    chosen = several_processes["choice"]
    for name, kind, *told in (
        ("small", "DDPStrategy", "fits in"),
        ("small shards", "FSDPStrategy", "says so", "runtime.reshard_after_forward = false: "),
        ("impossible", "FSDPStrategy", "doesn't fit", "runtime.reshard_after_forward = true: "),
    ):
        first, second = chosen[name]
        assert first == second
        assert first[0] == kind and all(text in first[1] for text in told)


def test_replicas_average_gradients(several_processes: Results) -> None:
    """Unused on one worker: zeros there; unused everywhere: still none, so no optimiser step."""
    both, alone, nowhere, infinite, narrow = several_processes["gradients"]
    torch.testing.assert_close(both, torch.full((3,), 2.0))
    torch.testing.assert_close(alone, torch.tensor([[0.5, 1.5], [1.0, 2.0]]))
    assert nowhere is None
    assert infinite.isinf().all()
    torch.testing.assert_close(narrow, torch.ones(2, dtype=torch.bfloat16))


def test_single_refuses_several_workers() -> None:
    with pytest.raises(ValueError, match="'single' runs one worker, got 2"):
        build_strategy("single", 2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_without_process_group(name: Literal["fsdp", "ddp"]) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a process group"):
        build_strategy(name, 2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_one_worker_shares_with_nobody(name: Literal["fsdp", "ddp"]) -> None:
    assert isinstance(build_strategy(name, 1, torch.device("cpu")), SingleStrategy)


@pytest.fixture
def one_rank_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank_group")
def test_groups_must_have_equal_size() -> None:
    with pytest.raises(ValueError, match="shard_size 2 must divide the number of workers, 1"):
        FSDPStrategy(torch.device("cpu"), shard_size=2)


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_a_process_group_of_another_size(name: Literal["fsdp", "ddp"]) -> None:
    with pytest.raises(ValueError, match="expected a process group of 2 workers, it has 1"):
        build_strategy(name, 2, torch.device("cpu"))


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("kind", [FSDPStrategy, DDPStrategy])
def test_gradients_of_nothing(kind: type[FSDPStrategy | DDPStrategy]) -> None:
    strategy = kind(torch.device("cpu"))
    with pytest.raises(ValueError, match="call prepare"), strategy.gradient_sync(True):
        pass


def test_clipping_scales_to_the_bound_and_inf_only_measures() -> None:
    strategy = SingleStrategy(torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert strategy.clip_grad_norm([parameter], float("inf")) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([3.0, 4.0]))
    assert strategy.clip_grad_norm([parameter], 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
