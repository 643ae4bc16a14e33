"""`piflow submit`, `jobs`, `logs` and `stop` against a real cluster that asks for a token."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from piflow.config import Recipe
from piflow.runs import folder as run_folder
from tests.faults.runs import small_recipe, write_inputs
from tests.servers import RayHead

REPOSITORY = Path(__file__).parents[2]
MAIN = "from piflow.cli import main; main()"
PLANTED = "planted-token-that-nobody-may-see"


@dataclass
class Client:
    """A machine that reaches the cluster's dashboard only."""

    head: RayHead
    folder: Path
    environment: dict[str, str]

    def __call__(
        self, *arguments: str, seconds: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command, with the cluster's address."""
        return subprocess.run(
            [sys.executable, "-c", MAIN, *arguments, "--address", self.head.address],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def log_has(self, job: str, pattern: str, seconds: float = 300) -> str:
        """A job's log, as soon as it has a line like that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            log = self("logs", job).stdout
            if re.search(pattern, log):
                return log
            time.sleep(2)
        pytest.fail(f"no {pattern!r} in the log:\n{log[-3000:]}")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        with RayHead(tmp_path_factory.mktemp("head")).running() as head:
            environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
            yield Client(head, tmp_path_factory.mktemp("client"), environment)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that goes on until it is stopped, of a tiny random model."""
    folder = tmp_path_factory.mktemp("shared")
    write_inputs(folder)
    training = {"steps": 1_000_000, "checkpoint_every": 1_000_000}
    return small_recipe(folder, "submitted", training=training, runtime={"num_workers": 1})


@pytest.fixture(scope="module")
def recipe_file(recipe: Recipe, client: Client) -> str:
    path = client.folder / "my-recipe.yaml"
    path.write_text(recipe.to_yaml())
    return str(path)


def test_a_run_is_submitted_attached_to_stopped_and_goes_on(
    client: Client, recipe: Recipe, recipe_file: str
) -> None:
    stages = ("--stages", "embed,distill")
    sent = client("submit", recipe_file, *stages, HF_TOKEN=PLANTED)
    assert sent.returncode == 0, sent.stderr
    job = re.findall(r"^job (submitted-[0-9a-f]{8}-1): embed -> distill, ", sent.stdout)[0]
    assert f"{client.head.address}/#/jobs/{job}" in sent.stdout
    assert "experiment piflow, run submitted" in sent.stdout

    log = client.log_has(job, r"steps [1-9]\d*/1000000")
    assert "piflow: arrived, " in log and "embed: prompts" in log

    again = client("submit", recipe_file, *stages, "--set", "runtime.max_failures=7")
    assert again.returncode == 0, again.stderr
    assert f"job {job} of this run is running: attached to it" in again.stdout
    assert "it was sent with other files or options" in again.stdout
    listed = client("jobs", COLUMNS="200").stdout
    assert job in listed and "embed, distill" in listed and listed.count("running") == 1

    stopped = client("stop", job.removesuffix("-1"))  # its run's name
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    step = int(re.findall(r"stopped by SIGTERM: step (\d+) is saved", stopped.stdout)[0])
    assert list(run_folder.checkpoints(recipe.run_dir)) == [step]
    assert re.search(r"stopped *│ *143 ", client("jobs", COLUMNS="200").stdout)

    steps = ("--set", f"training.steps={step + 2}")
    on = client("submit", recipe_file, "--stages", "distill", *steps, "--follow", seconds=500)
    assert on.returncode == 0, on.stdout + on.stderr
    assert f"job {job.removesuffix('1')}2: succeeded, exit code 0" in on.stdout
    assert max(run_folder.checkpoints(recipe.run_dir)) == step + 2
    assert not [path for path in _logs(client.head) if PLANTED.encode() in path.read_bytes()]


def test_a_mistake_ends_with_the_jobs_own_code(client: Client, recipe_file: str) -> None:
    """Its store is of other prompts than the recipe's: found on the cluster, where the store is."""
    failed = client(
        "submit", recipe_file, "--stages", "export", "--set", "run_dir=/tmp/no-run-is-here",
        "--follow",
    )  # fmt: skip
    assert failed.returncode == 1
    assert "piflow: no run in /tmp/no-run-is-here" in failed.stdout
    assert "failed, exit code 1" in failed.stdout


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {"RAY_AUTH_TOKEN": "0" * 40}, "refuses the token; set RAY_AUTH_MODE=token"),
        ([], {"RAY_AUTH_MODE": "disabled"}, "asks for a token; set RAY_AUTH_MODE=token"),
        (
            ["--set", "runtime.num_workers=3"], {},
            "need 3 x {CPU: 1} (runtime.num_workers, use_gpu, cpus_per_worker); the cluster has "
            "1 x {CPU: 2}. It fits with --set runtime.num_workers=2",
        ),
        (["--set", "runtime.use_gpu=true"], {}, "need 1 x {CPU: 1, GPU: 1}"),
    ],
)  # fmt: skip
def test_what_cannot_work_starts_nothing(
    options: list[str],
    environment: dict[str, str],
    expected: str,
    client: Client,
    recipe: Recipe,
    recipe_file: str,
) -> None:
    other_run = ("--set", f"run_dir={recipe.run_dir}-2")
    refused = client("submit", recipe_file, *other_run, *options, **environment)
    assert refused.returncode == 1 and refused.stdout == ""
    assert expected in refused.stderr and "Traceback" not in refused.stderr
    assert "-2" not in [line for line in client("jobs").stdout.splitlines() if "running" in line]


def test_the_gcs_port_is_no_dashboard(client: Client, recipe_file: str) -> None:
    arguments = ["submit", recipe_file, "--address", client.head.gcs]
    refused = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], env=client.environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "isn't Ray's dashboard" in refused.stderr


DRIVER = """
import os, sys, time
import ray
from piflow.config import load_recipe
from piflow.runtime.progress import mailbox_with_bar
from piflow.runtime.session import ray_session
from piflow.runtime.worker_log import Place, log_of

@ray.remote(num_cpus=0)
class Worker:
    def place(self):
        return ray.get_runtime_context().get_node_id(), os.getpid()
    def token(self):
        return os.environ.get("HF_TOKEN")
    def die(self):
        print("refused:", os.environ["HF_TOKEN"], "\\x1b[31m", file=sys.stderr, flush=True)
        os.abort()

recipe = load_recipe("pipelines/recipes/emoji-flux.yaml")
with ray_session(recipe), mailbox_with_bar("run", 1, show=False) as mailbox:
    worker = Worker.remote()
    print("worker has it:", ray.get(worker.token.remote()) == os.environ["HF_TOKEN"])
    print("environment:", ray.get_runtime_context().runtime_env)
    node, pid = ray.get(worker.place.remote())
    worker.die.remote()
    time.sleep(1)
    ray.get(mailbox.keep_log.remote(log_of(0, Place(node, pid, "head"))))
    gone = log_of(1, Place("0" * 56, pid, "elsewhere"))
    ray.get(mailbox.keep_log.remote(gone))
"""


def test_keys_of_the_driver_reach_workers_and_a_workers_log_the_driver(client: Client) -> None:
    """The cluster's processes were started without the variable; nobody else gets to see it."""
    environment = client.environment | {"RAY_ADDRESS": client.head.gcs, "HF_TOKEN": PLANTED}
    told = subprocess.run(
        [sys.executable, "-c", DRIVER], env=environment, cwd=REPOSITORY, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert "worker has it: True" in told.stdout, told.stderr
    assert re.search(r"the log of worker 0 \(process \d+ on head\) ends with:", told.stdout)
    assert "  | refused: <HF_TOKEN> \\x1b[31m" in told.stdout
    assert "the log of worker 1" in told.stdout and "its machine doesn't answer" in told.stdout
    assert PLANTED not in told.stdout + told.stderr
    jobs = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "list", "--address",
         client.head.address],
        env=client.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "set_keys_and_tokens" in jobs.stdout + jobs.stderr
    assert PLANTED not in jobs.stdout + jobs.stderr
    shown = [path for path in _logs(client.head) if PLANTED.encode() in path.read_bytes()]
    assert {path.suffix for path in shown} <= {".err"}, "only what the worker itself has written"


def _logs(head: RayHead) -> list[Path]:
    return [path for path in head.scratch.rglob("*") if path.is_file() and "logs" in path.parts]
