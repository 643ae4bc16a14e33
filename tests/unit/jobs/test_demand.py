"""Machines of a stage follow from recipe and values, and what doesn't go together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from piflow.config import Recipe, load_recipe
from piflow.jobs.demand import Group, demand, job_name, require_reachable
from piflow.jobs.values import Values, load_values

REPOSITORY = Path(__file__).parents[3]
VALUES = load_values(REPOSITORY / "cluster" / "values.yaml")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(REPOSITORY / "cluster" / "recipe.yaml", list(overrides))


def values(**sections: Any) -> Values:
    return Values.model_validate({**VALUES.model_dump(), **sections})


@pytest.mark.parametrize(
    ("workers", "pods", "gpus"),
    [("8", (1, 1), 8), ("[8, 16]", (1, 2), 8), ("[3, 16]", (1, 2), 8), ("4", (1, 1), 4)],
)
def test_training_gets_the_gpus_of_its_workers(
    workers: str, pods: tuple[int, int], gpus: int
) -> None:
    needed = demand(recipe(f"runtime.num_workers={workers}"), VALUES, "distill")
    group = needed.groups[0]
    assert (group.fewest, group.most, group.gpus) == (*pods, gpus)
    assert group.most * group.gpus == recipe(f"runtime.num_workers={workers}").runtime.max_workers


def test_half_a_machine_is_asked_for_by_its_half() -> None:
    group = demand(recipe("runtime.num_workers=4"), VALUES, "distill").groups[0]
    assert group == Group("gpu", 1, 1, gpus=4, cpus=92, memory_gib=950)


def test_gpus_that_would_be_idle_are_refused_with_the_numbers_that_fit() -> None:
    with pytest.raises(ValueError, match=r"4 would be paid for and idle; use 8 or 16 workers"):
        demand(recipe("runtime.num_workers=12"), VALUES, "distill")


def test_encoders_of_an_online_run_need_gpus_beside_the_workers() -> None:
    online = recipe("embed.mode=online", "runtime.num_workers=8", "embed.encoders=[1, 2]")
    assert demand(online, VALUES, "distill").groups[0].most == 2  # 8 + 2 GPUs of machines with 8


def test_fractional_gpus_of_encoders_are_rounded_up() -> None:
    embed = recipe("embed.encoders=[1, 5]", "embed.gpus_per_encoder=0.5")
    assert demand(embed, VALUES, "embed").groups[0].gpus == 3


def test_evaluation_draws_on_as_many_gpus_as_training_can_start_with() -> None:
    needed = demand(recipe("runtime.num_workers=[8, 16]"), VALUES, "evaluate")
    assert needed.driver_gpus == 0 and needed.groups[0] == Group("gpu", 1, 1, 8, 184, 1900)
    two = demand(recipe("evaluation.workers=2"), VALUES, "evaluate")
    assert two.driver_gpus == 0 and two.groups[0].gpus == 2


def test_evaluation_without_workers_draws_in_the_driver() -> None:
    gpu = demand(recipe("evaluation.workers=0"), VALUES, "evaluate")
    assert gpu.driver_gpus == 1 and gpu.groups[0].gpus == 1
    cpu = demand(recipe("runtime.use_gpu=false", "runtime.num_workers=2"), VALUES, "evaluate")
    assert cpu.driver_gpus == 0 and cpu.groups[0].fewest == 0 and cpu.groups[0].gpus == 0


def test_evaluation_on_cpu_workers_gets_their_machines() -> None:
    overrides = ["runtime.use_gpu=false", "runtime.num_workers=2", "evaluation.workers=4"]
    needed = demand(recipe(*overrides, "runtime.cpus_per_worker=5"), VALUES, "evaluate")
    assert needed.groups == (Group("cpu", 2, 2, 0, 15, 56),)
    with pytest.raises(ValueError, match="evaluation.workers asks for 4 processes of 8 CPUs"):
        demand(
            recipe(*overrides, "runtime.cpus_per_worker=8"),
            values(cpu_machines={**VALUES.cpu_machines.model_dump(), "most": 2}),
            "evaluate",
        )


PROMPT_SET = ["evaluation.prompt_set={path: s3://b/prompts.txt}", "evaluation.retrieval=false"]


@pytest.mark.parametrize(
    ("overrides", "gpus", "cpus", "driver"),
    [
        # encoders have ended when the workers draw
        (["embed.encoders=[1, 2]", "evaluation.workers=4"], (4, 1, 1), None, 0),
        (["embed.encoders=[2, 8]", "evaluation.workers=2"], (8, 1, 1), None, 0),
        (["embed.encoders=[1, 6]", "embed.gpus_per_encoder=0.5", "evaluation.workers=2"],
         (3, 1, 1), None, 0),
        # the driver keeps its own GPU beside theirs
        (["embed.encoders=[1, 3]", "evaluation.workers=0"], (4, 1, 1), None, 1),
        # without GPUs for encoders they run on CPUs
        (["embed.encoders=[1, 40]", "embed.gpus_per_encoder=0", "evaluation.workers=2"],
         (2, 1, 1), (1, 3), 0),
        (["runtime.use_gpu=false", "runtime.num_workers=2", "embed.gpus_per_encoder=0",
          "embed.encoders=[1, 40]", "evaluation.workers=4", "runtime.cpus_per_worker=7.5"],
         None, (2, 3), 0),
        (["runtime.use_gpu=false", "runtime.num_workers=2", "embed.encoders=[1, 2]",
          "evaluation.workers=4", "runtime.cpus_per_worker=3"], (2, 1, 1), (1, 1), 0),
    ],
)  # fmt: skip
def test_an_evaluations_own_prompts_need_encoders(
    overrides: list[str],
    gpus: tuple[int, int, int] | None,
    cpus: tuple[int, int] | None,
    driver: int,
) -> None:
    """GPUs of a machine with fewest and most machines; and those without GPUs."""
    needed = demand(recipe(*PROMPT_SET, *overrides), VALUES, "evaluate")
    assert needed.driver_gpus == driver and needed.has_gpus == (gpus is not None)
    if gpus is not None:
        first = needed.groups[0]
        assert (first.gpus, first.fewest, first.most) == gpus
    if cpus is not None:
        assert (needed.groups[-1].fewest, needed.groups[-1].most) == cpus


def test_workers_without_gpus_share_cpu_machines() -> None:
    cpu = recipe("runtime.use_gpu=false", "runtime.num_workers=4", "runtime.cpus_per_worker=5")
    assert demand(cpu, VALUES, "distill").groups == (Group("cpu", 2, 2, 0, 15, 56),)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["runtime.cpus_per_worker=24"], "use at most 23"),
        (["runtime.use_gpu=false", "runtime.cpus_per_worker=8"], "room for 4"),
        (["runtime.use_gpu=false", "runtime.cpus_per_worker=16"], "room for 0"),
    ],
)
def test_machines_that_are_too_small_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        demand(recipe(*overrides), VALUES, "distill")


def test_a_recipe_for_gpus_needs_machines_with_gpus() -> None:
    with pytest.raises(ValueError, match="no gpu_machines"):
        demand(recipe(), values(gpu_machines=None), "distill")


def test_names_become_those_of_kubernetes() -> None:
    assert job_name(recipe("name=a.b_c"), VALUES, "embed") == "a-b-c-embed"
    assert job_name(recipe("name=1st"), values(run_name="first"), "embed") == "first-embed"
    for name in ("1st", "a" * 44):
        with pytest.raises(ValueError, match="set run_name"):
            job_name(recipe(f"name={name}"), VALUES, "embed")


@pytest.mark.parametrize(
    ("override", "shared", "told"),
    [
        ("run_dir=runs/a", None, "run_dir = runs/a"),
        ("model.vae=/models/vae", "/mnt/piflow", "model.vae"),
        ("embed.store=../a", "/mnt/piflow", "embed.store"),
        ("embed.prompts=/mnt/piflow-other/p.txt", "/mnt/piflow", "embed.prompts"),
        ("tracking.uri=null", None, "tracking.uri is empty"),
        ("tracking.uri=sqlite:///a.db", None, "one machine"),
    ],
)
def test_places_that_not_all_machines_reach_are_refused(
    override: str, shared: str | None, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        require_reachable(recipe(override), shared)


def test_places_in_a_shared_folder_are_reached() -> None:
    require_reachable(recipe("run_dir=runs/a", "embed.store=/mnt/piflow/s"), "/mnt/piflow")
    require_reachable(recipe("embed.prompts=package://piflow.demo/prompts.txt"), None)
