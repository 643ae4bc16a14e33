"""A driver ends as it should when Ray's own processes die, or a job system ends all of them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from piflow.runs import folder as run_folder
from tests.faults.runs import (
    SmallRun,
    make_store,
    small_recipe,
    train_workers,
    wait_until,
    write_inputs,
)

pytestmark = pytest.mark.timeout(900)
STEPS = 400


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Inputs and store of runs that start a Ray of their own."""
    folder = tmp_path_factory.mktemp("system")
    make_store(folder, environment)
    return folder


def new_run(folder: Path, environment: dict[str, str], name: str) -> SmallRun:
    training = {"steps": STEPS, "checkpoint_every": 5, "keep_last": 2}
    recipe = small_recipe(folder, name, training=training, runtime={"max_failures": 2})
    return SmallRun(folder, recipe, environment | {"OMP_NUM_THREADS": "1"}, pace=0.3)


def processes_of(driver: int, word: str) -> list[psutil.Process]:
    """Those below the driver whose command line starts with a word like this."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if any(word in part for part in process.cmdline()[:1]):
                found.append(process)
    return found


def test_a_job_system_that_ends_all_processes_loses_no_step(
    inputs: Path, environment: dict[str, str]
) -> None:
    """SIGTERM to driver, workers and all of Ray's processes at once, as systemd and Slurm send."""
    run = new_run(inputs, environment, "all-at-once")
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 6, "at step 6", run, 600)
        for process in psutil.Process(driver.pid).children(recursive=True):
            process.send_signal(signal.SIGTERM)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 128 + signal.SIGTERM, run.log
    saved = max(run_folder.checkpoints(run.recipe.run_dir))
    assert saved == run.last_step() + 1, "no step is lost"
    assert f"stopped by SIGTERM: step {saved} is saved" in run.log
    assert run.status() == "KILLED"


@pytest.mark.parametrize("process", ["gcs_server", "raylet/raylet"])
def test_a_dead_ray_says_so_and_that_another_start_can_help(
    process: str, inputs: Path, environment: dict[str, str]
) -> None:
    run = new_run(inputs, environment, f"dead-{Path(process).name}")
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 6, "at step 6", run, 600)
        for victim in processes_of(driver.pid, process):
            victim.kill()
        assert driver.wait(50) == 75, run.log
    assert f"piflow: Ray's {Path(process).name} on this machine ended" in run.log
    assert run.status() == "FAILED"


@pytest.mark.parametrize("actor", ["ray::Mailbox", "ray::TrainController"])
def test_dead_actors_of_ours_cost_an_attempt_at_most(
    actor: str, inputs: Path, environment: dict[str, str]
) -> None:
    run = new_run(inputs, environment, f"dead-{actor.removeprefix('ray::').lower()}")
    with run.running() as driver:
        wait_until(lambda: run.last_step() >= 6, "at step 6", run, 600)
        before, step = train_workers(), run.last_step()
        for victim in processes_of(driver.pid, actor):
            victim.kill()
        wait_until(lambda: run.last_step() >= step + 8, "going on", run, 300)
        if actor == "ray::TrainController":
            assert not set(before) & set(train_workers())
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 128 + signal.SIGTERM, run.log
    saved = max(run_folder.checkpoints(run.recipe.run_dir))
    assert f"stopped by SIGTERM: step {saved} is saved" in run.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_ray_starts_keeps_its_meaning(
    number: int, inputs: Path, environment: dict[str, str]
) -> None:
    run = new_run(inputs, environment, f"early-{signal.Signals(number).name.lower()}")
    with run.running() as driver:
        wait_until(lambda: processes_of(driver.pid, "gcs_server"), "starting Ray", run)
        driver.send_signal(number)
        assert driver.wait(60) == 128 + number, run.log
    assert "stopped by " in run.log and run.status() == "KILLED"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_embed_keeps_its_meaning(
    number: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    write_inputs(tmp_path)
    recipe = small_recipe(tmp_path, "embed")
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", "from piflow.cli import main; main()", "embed", str(file)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as driver:
        wait_until(lambda: processes_of(driver.pid, "ray::"), "working")
        driver.send_signal(number)
        _, error = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number, error.decode()
