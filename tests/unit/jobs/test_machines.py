"""What `piflow render` writes for machines without Kubernetes; its scripts run with stand-ins."""

from __future__ import annotations

import copy
import functools
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import (
    prepare_config,
    validate_config,
    with_head_node_ip,
)
from typer.testing import CliRunner

from piflow import cli
from piflow.config import load_recipe
from piflow.jobs.render import Job, render
from piflow.jobs.values import Values, load_values

REPOSITORY = Path(__file__).parents[3]
CLUSTER = REPOSITORY / "cluster"
RECIPE, VALUES = CLUSTER / "recipe.yaml", CLUSTER / "values.yaml"
UP = ("aws", "gcp", "on-premise")


def rendered(target: str, *overrides: str, **sections: Any) -> dict[str, str]:
    values = Values.model_validate({**load_values(VALUES).model_dump(), **sections})
    recipe = load_recipe(RECIPE, list(overrides))
    return render(Job(recipe, RECIPE.read_text(), values, overrides), target)


def config(target: str, *overrides: str, **sections: Any) -> dict[str, Any]:
    return yaml.safe_load(rendered(target, *overrides, **sections)["cluster.yaml"])


def section(name: str, **keys: Any) -> dict[str, Any]:
    return load_values(VALUES).model_dump()[name] | keys


@pytest.mark.parametrize("target", UP)
def test_a_stopped_job_has_the_time_to_save(target: str) -> None:
    """Ray reads the seconds between SIGTERM and SIGKILL from the head's environment, else 3."""
    values = load_values(VALUES)
    shipped = yaml.safe_load((CLUSTER / target / "cluster.yaml").read_text())
    told = config(target, saving_seconds=values.saving_seconds + 7)
    for tree, seconds in ((shipped, values.saving_seconds), (told, values.saving_seconds + 7)):
        [start] = [line for line in tree["head_start_ray_commands"] if "ray start --head" in line]
        assert f"RAY_JOB_STOP_WAIT_TIME_S={seconds} " in start.split("ray start")[0]


@pytest.mark.parametrize("target", [*UP, "slurm", "sky"])
def test_the_committed_example_is_what_is_written(target: str, tmp_path: Path) -> None:
    arguments = ["render", str(RECIPE), "--target", target, "--values", str(VALUES)]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    example = {path.name: path.read_text() for path in (CLUSTER / target).iterdir()}
    assert written == example, "`make render` writes cluster/ again"


@pytest.mark.parametrize("target", UP)
def test_ray_takes_the_file_and_adds_none_of_its_defaults(target: str) -> None:
    written = config(target)
    prepared = prepare_config(copy.deepcopy(written))
    validate_config(prepared)
    text = yaml.safe_dump(prepared)
    assert "wheel" not in text and "pip install" not in text and "latest" not in text
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[key] == []
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][1]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in prepared[key][1]


def test_a_planted_key_is_refused_by_ray() -> None:
    planted = config("aws") | {"max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(planted))


@pytest.mark.parametrize("target", ["aws", "gcp"])
def test_machines_are_those_of_the_recipe(target: str) -> None:
    types = config(target, "runtime.num_workers=[8, 24]")["available_node_types"]
    assert types["gpu"]["max_workers"] * types["gpu"]["resources"]["GPU"] == 24
    assert types["head"]["resources"] == {"CPU": 0}
    assert {kind["min_workers"] for kind in types.values()} == {0}


@functools.cache
def _run_instances() -> Any:
    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape


def run_instances_problems(node: dict[str, Any]) -> str:
    """What botocore finds wrong with a machine's arguments, but for those that Ray replaces."""
    own = {key: value for key, value in node.items() if key != "SubnetIds"}
    return (
        ParamValidator()
        .validate({**own, "MinCount": 1, "MaxCount": 1}, _run_instances())
        .generate_report()
    )


@pytest.mark.parametrize("cards", [0, 4, 32])
def test_ec2_takes_the_arguments_of_every_machine(cards: int) -> None:
    types = config("aws", aws=section("aws", efa_cards=cards, gpu_market="spot"))
    for kind in types["available_node_types"].values():
        assert run_instances_problems(kind["node_config"]) == ""
    gpu = types["available_node_types"]["gpu"]["node_config"]
    interfaces = gpu.get("NetworkInterfaces", [])
    assert [(i["NetworkCardIndex"], i["DeviceIndex"]) for i in interfaces] == [
        (card, min(card, 1)) for card in range(cards)
    ]
    assert ("SubnetIds" in gpu) == ("SecurityGroupIds" in gpu) == (cards == 0)
    assert gpu["InstanceMarketOptions"]["MarketType"] == "spot"


def test_a_planted_argument_is_refused_by_ec2() -> None:
    node = config("aws")["available_node_types"]["cpu"]["node_config"]
    assert "VolumeSise" in run_instances_problems(
        {**node, "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSise": 5}}]}
    )


def test_every_ec2_machine_has_its_own_rights_and_an_encrypted_disk() -> None:
    types = config("aws")["available_node_types"]
    for name, kind in types.items():
        node = kind["node_config"]
        profile = "piflow-head" if name == "head" else "piflow-worker"
        assert node["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_too_few_own_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="on_premise.workers has 2"):
        config("on-premise", "runtime.num_workers=24")


@pytest.mark.parametrize("target", [*UP, "slurm", "sky"])
def test_a_target_without_its_values_is_refused(target: str) -> None:
    name = target.replace("-", "_")
    with pytest.raises(ValueError, match=f"section {name}"):
        rendered(target, **{name: None})


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def environment(programs: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **variables}


@pytest.mark.parametrize("target", ["aws", "gcp", "on-premise"])
def test_the_recipe_is_submitted_with_its_overrides(
    target: str, programs: Path, tmp_path: Path
) -> None:
    overrides = ["training.steps=7", "tracking.experiment=two $words"]
    (tmp_path / "submit.sh").write_text(rendered(target, *overrides)["submit.sh"])
    program(programs, "piflow", 'printf "%s\\n" "$RAY_AUTH_MODE" "$RAY_API_SERVER_ADDRESS" "$@"')
    done = subprocess.run(
        ["bash", tmp_path / "submit.sh", "--stages", "embed"],
        env=environment(programs), capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    expected = ["token", "http://127.0.0.1:8265", "submit", str(tmp_path / "recipe.yaml")]
    expected += ["--set", overrides[0], "--set", overrides[1]]
    waits = [] if target == "on-premise" else ["--wait-for-nodes"]
    assert done.stdout.splitlines() == [*expected, *waits, "--stages", "embed"]


_SRUN = 'while [ "$1" != ray ]; do shift; done; exec "$@"'
_RAY = """
while [ "$1" != -- ]; do shift; done; shift
"$@"; exit 9  # as a worker node's process may end
"""
_PIFLOW = """
echo "$RAY_ADDRESS $*" > piflow.args
test -s "$RAY_AUTH_TOKEN_PATH" && stat -c %a "$RAY_AUTH_TOKEN_PATH" >> piflow.args
trap 'echo saved > piflow.saved; exit 143' TERM
for _ in $(seq "$STEPS"); do sleep 0.1; done
exit "$CODE"
"""


@pytest.fixture
def slurm_job(programs: Path, tmp_path: Path) -> Path:
    """A folder with the script, and programs that stand in for Slurm's, Ray's and piflow."""
    script = rendered("slurm", "training.steps=7")["piflow.sbatch"]
    (tmp_path / "piflow.sbatch").write_text(script)
    program(programs, "srun", _SRUN)
    program(programs, "ray", _RAY)
    program(programs, "piflow", _PIFLOW)
    program(
        programs, "scontrol", 'case $1 in show) echo node-a; echo node-b;; *) echo "$@" > sc;; esac'
    )
    return tmp_path


def start(job: Path, steps: int, code: int) -> subprocess.Popen[bytes]:
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "STEPS": str(steps),
        "CODE": str(code),
    }
    return subprocess.Popen(
        ["bash", "piflow.sbatch", "distill"],
        cwd=job, env=environment(job / "bin", **variables), start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_ends_with_the_drivers_code(slurm_job: Path, code: int) -> None:
    assert start(slurm_job, steps=1, code=code).wait(30) == code
    said, mode = (slurm_job / "piflow.args").read_text().splitlines()
    assert said == "node-a:6379 distill recipe.yaml --quiet --set training.steps=7"
    assert mode == "600"
    assert not (slurm_job / "sc").exists(), "nothing is queued again"
    assert not list(slurm_job.glob(".piflow-*")), "token and notes are gone"


def test_slurms_notice_reaches_the_driver_and_the_job_is_queued_again(slurm_job: Path) -> None:
    process = start(slurm_job, steps=200, code=0)
    until = time.monotonic() + 20
    while not (slurm_job / "piflow.args").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)  # B: to the batch script alone
    assert process.wait(30) == 143
    assert (slurm_job / "piflow.saved").read_text() == "saved\n"
    assert (slurm_job / "sc").read_text() == "requeue 7\n"


def test_slurms_directives_are_the_recipes_numbers() -> None:
    script = rendered("slurm", "runtime.num_workers=24")["piflow.sbatch"]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M))
    assert (options["nodes"], options["gpus-per-node"], options["signal"]) == (
        "3",
        "8",
        "B:TERM@150",
    )
    assert "--num-gpus=8" in script


def test_skypilots_task_has_the_recipes_numbers_and_no_secrets() -> None:
    task = yaml.safe_load(rendered("sky", "runtime.num_workers=24")["task.yaml"])
    assert task["num_nodes"] == 3 and task["resources"]["accelerators"] == "H100:8"
    assert set(task["secrets"].values()) == {None}
    assert "RAY_ADDRESS" in task["run"]
    with pytest.raises(ValueError, match="sky.accelerator"):
        rendered("sky", sky=section("sky", accelerator=None))


def test_skypilots_script_is_bash(tmp_path: Path, programs: Path) -> None:
    task = yaml.safe_load(rendered("sky", "embed.prompts=s3://b/it's $(id).txt")["task.yaml"])
    program(programs, "ray", 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"')
    program(programs, "piflow", 'printf "%s\\n" "$RAY_ADDRESS" "$@"')
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", "-c", task["run"]], env=environment(programs, STAGE="embed", **variables),
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    address, stage, *_, override = done.stdout.splitlines()
    assert (address, stage) == ("10.0.0.1:6390", "embed")
    assert override == "embed.prompts=s3://b/it's $(id).txt"


# -------------------------------------------------------------------------------- spot notices


@pytest.mark.parametrize("target", ["aws", "gcp"])
def test_workers_start_one_watcher_each_as_ray_calls_it(target: str, tmp_path: Path) -> None:
    """Ray wraps a command in a shell of its own; a second start meets the first one's lock."""
    command = config(target)["worker_start_ray_commands"][-1]
    words = _with_interactive(with_head_node_ip([command], "10.0.0.5")[0])
    piflow = tmp_path / "piflow"
    piflow.write_text(f'#!/bin/sh\necho "$RAY_AUTH_MODE $@" >> {tmp_path}/called\nsleep 3\n')
    piflow.chmod(0o755)
    (tmp_path / ".bashrc").touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    for _ in range(2):
        began = time.monotonic()
        subprocess.run(
            ["bash", "-c", *shlex.split(words[-1])], env=environment, check=True, timeout=20
        )
        assert time.monotonic() - began < 2.5, "the next command must not wait for the watcher"
    time.sleep(1)
    (called,) = (tmp_path / "called").read_text().splitlines()
    assert called.startswith(f"token watch-spot --cloud {target}")
    assert called.endswith("--address 10.0.0.5:6379")
    CliRunner().invoke(cli.app, [*called.split()[1:], "--help"], catch_exceptions=False)


def test_without_spot_machines_nothing_is_watched() -> None:
    aws = section("aws", cpu_market="on-demand")
    assert len(config("aws", aws=aws)["worker_start_ray_commands"]) == 2
    watching = section("aws", gpu_market="spot", on_rebalance="drain")
    (watcher,) = config("aws", aws=watching)["worker_start_ray_commands"][2:]
    assert "--on-rebalance drain" in watcher


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120), ("gcp", 30)])
def test_a_save_that_takes_longer_than_the_notice_is_refused(cloud: str, seconds: int) -> None:
    spot = section(cloud, gpu_market="spot")
    with pytest.raises(ValueError, match=rf"{cloud}.gpu_market = spot \({seconds} s\)"):
        rendered(cloud, kubernetes=None, saving_seconds=seconds, **{cloud: spot})
