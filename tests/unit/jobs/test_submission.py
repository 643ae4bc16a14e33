"""Stages, names and commands of a submitted job, and whether a cluster has room for it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from piflow.config import Recipe, load_recipe, parse_recipe
from piflow.jobs import fit, submission
from piflow.jobs.demand import local_places
from piflow.runtime.job_server import Node

RECIPES = Path(__file__).parents[3] / "pipelines/recipes"
FLUX = RECIPES / "flux1-dev-gm-4nfe-datafree.yaml"


def recipe_with(*overrides: str, path: Path = FLUX) -> Recipe:
    return load_recipe(path, list(overrides))


def gpu_node(gpus: int, gib: float = 80.0, cpus: int = 96) -> Node:
    return Node("gpu", cpus, gpus, "H100", gib)


def test_stages_are_all_that_a_recipe_needs() -> None:
    assert submission.stages_of(recipe_with()) == ("embed", "distill", "evaluate", "export")
    assert submission.stages_of(recipe_with("embed.mode=online"))[0] == "distill"
    teacher = load_recipe(RECIPES / "emoji-teacher.yaml")
    assert submission.stages_of(teacher) == ("embed", "pretrain")
    assert submission.stages_of(recipe_with(), "export, embed") == ("embed", "export")


@pytest.mark.parametrize("asked", ["embed,train", "pretrain", "", ","])
def test_stages_that_a_recipe_lacks_are_refused(asked: str) -> None:
    with pytest.raises(ValueError, match="expected some of embed,distill,evaluate,export"):
        submission.stages_of(recipe_with(), asked)


def test_a_runs_jobs_have_one_name_and_other_runs_another() -> None:
    key = submission.run_key(recipe_with())
    assert key == submission.run_key(recipe_with("runtime.num_workers=4", "training.keep_last=9"))
    others = ["run_dir=/other", "seed=7", "training.optimizer.lr=3e-4"]
    assert len({submission.run_key(recipe_with(other)) for other in others} | {key}) == 4


def test_the_command_checks_the_image_first_and_stops_at_a_failure() -> None:
    recipe = recipe_with("run_dir=s3://bucket/run", "training.optimizer.type=adamw8bit")
    assert submission.command(recipe, ("embed", "distill"), "1.2.3") == (
        "trap 'exit 143' TERM; python piflow_arrival.py --piflow 1.2.3 "
        "--module 'mlflow=piflow[mlflow]' --module 'boto3=piflow[s3]' "
        "--module 'torchao=piflow[lowbit]' && piflow embed recipe.yaml "
        "&& piflow distill recipe.yaml"
    )


def test_a_stopped_job_waits_for_its_stage_and_starts_no_other(tmp_path: Path) -> None:
    """SIGTERM reaches all processes of a job, the shell among them."""
    for name, script in {
        "python": "exit 0",
        "piflow": "trap 'sleep 0.5; echo saved; exit 0' TERM; sleep 20 >/dev/null & echo $1; wait",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(
        submission.command(recipe_with(), ("embed", "distill"), "1.2.3"),
        shell=True,
        start_new_session=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stdout.readline() == "embed\n"
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(20) == 143 and job.stdout.read() == "saved\n"


def test_an_evaluation_with_networks_needs_their_package_and_places() -> None:
    network = "{path: runs/dinov2, sha256: %s, licence: apache-2.0}" % ("ab" * 32)
    asked = (f"evaluation.networks.dinov2={network}", "evaluation.metrics=[kd_dinov2]",
             "evaluation.references=pictures")  # fmt: skip
    recipe = recipe_with(*asked)
    assert "torchmetrics=piflow[metrics]" in submission.needs(recipe, ("evaluate",))
    for other, stages in ((recipe, ("distill",)), (recipe_with(), ("evaluate",))):
        assert "torchmetrics=piflow[metrics]" not in submission.needs(other, stages)
    places = local_places(recipe)
    assert places["evaluation.networks.dinov2.path"] == "runs/dinov2"
    assert places["evaluation.references"] == "pictures"


def test_places_of_this_machine_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embed\.store = runs/.*--set [\w.]+=/shared"):
        submission.require_places(recipe_with("embed.store=runs/store"))
    elsewhere = (
        "run_dir=s3://bucket/run", "embed.store=s3://bucket/store",
        "model.path=hf://owner/name/transformer", "encoder.path=hf://owner/name",
        "model.vae=hf://owner/name/vae",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"tracking\.uri is empty"):
        submission.require_places(recipe_with(*elsewhere))
    submission.require_places(recipe_with(*elsewhere, "tracking.uri=sqlite:////shared/mlflow.db"))


def test_an_evaluation_in_the_driver_is_refused_where_the_base_needs_a_gpu() -> None:
    recipe = recipe_with("runtime.use_gpu=true", "evaluation.workers=0")
    with pytest.raises(ValueError, match=r"holds no GPU.*--set evaluation\.workers=1"):
        submission.require_drawing_on_workers(recipe, ("distill", "evaluate"))
    submission.require_drawing_on_workers(recipe, ("distill",))
    for other in ("evaluation.workers=1", "evaluation.workers=null", "runtime.use_gpu=false"):
        possible = recipe_with("runtime.use_gpu=true", "evaluation.workers=0", other)
        submission.require_drawing_on_workers(possible, ("evaluate",))


DISTILL: tuple[submission.Stage, ...] = ("distill",)
EIGHT = ("runtime.num_workers=8", "runtime.use_gpu=true", "runtime.cpus_per_worker=8")


def refusal(recipe: Recipe, nodes: list[Node], worker_gib: fit.WorkerGib | None = None) -> str:
    with pytest.raises(fit.DoesNotFitError) as caught:
        fit.require_fit(recipe, DISTILL, nodes, worker_gib)
    return str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([gpu_node(4), gpu_node(2)], "It fits with --set runtime.num_workers=6"),
        ([gpu_node(8, cpus=32)], "It fits with --set runtime.cpus_per_worker=4"),
        ([gpu_node(8, cpus=8)], "It fits with --set runtime.cpus_per_worker=1"),
        ([Node("cpu", 64)], "the cluster has 1 x {CPU: 64}. No change of the recipe's"),
        ([], "the cluster has none"),
    ],
)
def test_a_job_without_room_is_told_the_cheapest_change(nodes: list[Node], expected: str) -> None:
    recipe = recipe_with(*EIGHT)
    told = refusal(recipe, nodes)
    assert "need 8 x {CPU: 8, GPU: 1} (runtime.num_workers" in told and expected in told


def test_what_is_told_to_fit_does() -> None:
    nodes = [gpu_node(4), gpu_node(2)]
    changed = recipe_with(*EIGHT, "runtime.num_workers=6")
    fit.require_fit(changed, DISTILL, nodes, None)
    assert fit.misfit(recipe_with(*EIGHT, "runtime.num_workers=7"), DISTILL, nodes, None)


def test_an_elastic_recipe_needs_its_fewest() -> None:
    recipe = recipe_with(*EIGHT, "runtime.num_workers=[4, 8]")
    fit.require_fit(recipe, DISTILL, [gpu_node(4)], None)
    assert "num_workers=3" in refusal(recipe, [gpu_node(3)])


def test_gpu_memory_counts_where_it_is_known() -> None:
    recipe = load_recipe(
        RECIPES / "emoji-flux.yaml",
        ["runtime.num_workers=2", "runtime.use_gpu=true", "runtime.activation_checkpointing=none"],
    )
    estimate = fit.Estimate()
    needed = estimate(recipe)
    assert needed > 1.5 * estimate(_changed(recipe, "runtime.activation_checkpointing", "full")), (
        "the test is about a recipe that activations decide"
    )
    small, unknown = gpu_node(2, gib=needed), Node("gpu", 96, 2)
    for enough in (gpu_node(2), unknown):
        fit.require_fit(recipe, DISTILL, [enough], estimate)
    fit.require_fit(recipe, DISTILL, [small], None)
    told = refusal(recipe, [small], estimate)
    assert "GiB of GPU memory" in told and "gpu's H100 has" in told
    key, _, value = told.partition("It fits with --set ")[2].partition("=")
    assert key == "runtime.activation_checkpointing"
    assert fit.misfit(_changed(recipe, key, value), DISTILL, [small], estimate) is None


def _changed(recipe: Recipe, key: str, value: str) -> Recipe:
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    section, name = key.split(".")
    tree[section][name] = value
    return parse_recipe(tree)


def test_online_encoders_are_counted() -> None:
    online = recipe_with(
        *EIGHT, "embed.mode=online", "embed.gpus_per_encoder=1", "embed.encoders=[2, 2]"
    )
    fit.require_fit(online, DISTILL, [gpu_node(8), gpu_node(2)], None)
    assert "2 x {CPU: 1, GPU: 1}" in refusal(online, [gpu_node(8), gpu_node(1)])


def test_an_evaluations_workers_are_counted() -> None:
    recipe = recipe_with(*EIGHT, "evaluation.workers=3")
    assert fit.misfit(recipe, ("evaluate",), [gpu_node(3)], None) is None
    told = fit.misfit(recipe, ("evaluate",), [gpu_node(2)], None)
    assert told is not None and "an evaluation's workers need 3 x {CPU: 8, GPU: 1}" in told


def test_encoders_of_an_evaluations_own_prompts_are_counted() -> None:
    """They come first: drawing's GPUs are enough for them, but there must be one."""
    recipe = recipe_with(
        "evaluation.prompt_set={path: s3://b/prompts.txt}",
        "evaluation.retrieval=false",
        "evaluation.workers=0",
        "embed.gpus_per_encoder=0.5",
    )
    assert fit.misfit(recipe, ("evaluate",), [gpu_node(1)], None) is None
    told = fit.misfit(recipe, ("evaluate",), [gpu_node(0)], None)
    assert (
        told is not None
        and "encoders of an evaluation's prompts need 1 x {CPU: 1, GPU: 0.5}" in (told)
    )


def test_no_change_of_another_kind_is_proposed() -> None:
    """Whatever is proposed leaves the run what it is."""
    recipe = recipe_with(*EIGHT)
    for keys in fit.changes(recipe):
        tree: dict[str, Any] = recipe.model_dump(mode="json")
        for key, value in keys.items():
            section, name = key.split(".")
            tree[section][name] = value
        try:
            changed = parse_recipe(tree)
        except ValueError:
            continue
        assert changed.hash() == recipe.hash(), keys
