"""Ray clusters of machines, started as KubeRay starts pods, and runs that are jobs on them."""

from __future__ import annotations

import os
import shlex
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from piflow import storage
from piflow.config import Recipe, parse_recipe
from piflow.jobs.kuberay import ray_job
from piflow.jobs.values import Values, parse_values
from tests.cluster.machines import Machine, Network
from tests.faults.runs import SmallRun, small_recipe, wait_until

REPOSITORY = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 2
SAVING_SECONDS = 90
_START_SECONDS = 600  # on loaded machines; 10 to 20 s on quiet ones
_STORE_BYTES = 200 * 2**20  # of a machine's object store
_INHERITED = ("PATH", "LANG", "XDG_DATA_DIRS", "OMP_NUM_THREADS")


def ray_environment() -> dict[str, str]:
    """Of every process that uses a cluster; a user's own settings don't reach it."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 on a machine that is busy with other things takes for ever
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


def machine_environment(**more: str) -> dict[str, str]:
    """Of a machine's processes; the keys of S3 stand for a role's."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    keys = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    return inherited | keys | ray_environment() | more


def ray_start(*options: str, **parameters: str) -> list[str]:
    """The command of a pod's container, as KubeRay writes it."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
    words += [f"--object-store-memory={_STORE_BYTES}", "--dashboard-agent-listen-port=52365"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]
    return ["/bin/bash", "-c", f"ulimit -n 4096; {shlex.join(words)}"]


def is_healthy(url: str) -> bool:
    """Whether a health check passes."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@dataclass
class Cluster:
    """A head that computes nothing, and workers of one logical CPU each."""

    network: Network
    head: Machine

    @property
    def address(self) -> str:
        """For `RAY_ADDRESS`."""
        return f"{self.head.address}:6379"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:8265"

    @cached_property
    def jobs(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.dashboard)

    def wait(self) -> None:
        """Until the head answers, its job server as well."""
        url = f"{self.dashboard}/api/gcs_healthz"

        def answers() -> bool:
            assert self.head.is_up, self.head.log
            return is_healthy(url)

        wait_until(answers, "a head", seconds=_START_SECONDS)

    def worker(self, environment: Mapping[str, str], cpus: int = 1) -> Machine:
        """A further machine, which may not have joined yet."""
        command = ray_start(address=self.address, num_cpus=str(cpus), num_gpus="0")
        return self.network.machine("worker", command, environment)


def start_head(
    network: Network,
    environment: Mapping[str, str],
    instead_of: Machine | None = None,
    **parameters: str,
) -> Cluster:
    """A cluster that waits for workers; its job server may not answer yet."""
    fixed = {"port": "6379", "dashboard_host": "0.0.0.0", "num_cpus": "0", "num_gpus": "0"}
    command = ray_start("--head", **fixed | parameters)
    return Cluster(network, network.machine("head", command, environment, instead_of))


@dataclass(frozen=True)
class Pods:
    """The pods of a rendered RayJob: their variables, and their grace when they are deleted."""

    head: dict[str, str]
    worker: dict[str, str]
    grace: float

    @classmethod
    def of(cls, recipe: Recipe) -> Pods:
        """As `piflow render` has them, with the example's values."""
        values = _values()
        assert values.kubernetes is not None
        job = ray_job(recipe, values, values.kubernetes, "distill", ())
        cluster = job["spec"]["rayClusterSpec"]
        head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        spec = workers["template"]["spec"]
        assert workers["rayStartParams"]["num-cpus"] == "1" and workers["maxReplicas"] == 2
        grace = spec["terminationGracePeriodSeconds"]
        return cls(_variables(head["template"]["spec"]), _variables(spec), grace)

    def start(self, network: Network, workers: int) -> tuple[Cluster, list[Machine]]:
        """A cluster of such pods, whose head answers."""
        cluster = start_head(network, machine_environment(**self.head))
        cluster.wait()  # as KubeRay's init container does: a worker without a head ends
        return cluster, [cluster.worker(machine_environment(**self.worker)) for _ in range(workers)]


def _values() -> Values:
    tree = yaml.safe_load((REPOSITORY / "cluster" / "values.yaml").read_text())
    tree["saving_seconds"] = SAVING_SECONDS
    tree["environment"] = {}
    tree["cpu_machines"] = {"cpus": 1, "memory_gib": 4, "most": 2}
    return parse_values(tree)


def _variables(spec: Mapping[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in spec["containers"][0]["env"]}


@dataclass(frozen=True)
class Inputs:
    """What runs read, all of it on an object store."""

    folder: Path  # for the recipes and what workers note
    uri: str
    tracking_uri: str

    def recipe(self, name: str, **sections: dict[str, Any]) -> Recipe:
        """`small_recipe` with all its places on the object store."""
        recipe = small_recipe(self.folder, name, **sections)
        tree = recipe.model_dump(mode="json")
        for section, key in (
            ("model", "path"), ("encoder", "path"), ("embed", "prompts"), ("embed", "store"),
        ):  # fmt: skip
            place = Path(tree[section][key]).relative_to(self.folder)
            tree[section][key] = storage.join(self.uri, *place.parts)
        tree["run_dir"] = storage.join(self.uri, "runs", name)
        tree["tracking"]["uri"] = self.tracking_uri
        return parse_recipe(tree)

    def upload(self) -> None:
        """The folder's model and prompts, as `write_inputs` leaves them."""
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                place = storage.join(self.uri, *file.relative_to(self.folder).parts)
                storage.write_bytes(place, file.read_bytes())


@dataclass
class JobRun(SmallRun):
    """A run whose driver is a job on a cluster, in the head's machine."""

    cluster: Cluster | None = None

    def submit(self, cluster: Cluster) -> None:
        """Start the driver, at first or again on another cluster."""
        self.cluster = cluster
        self.prepare()
        cluster.jobs.submit_job(entrypoint=shlex.join(self.command), submission_id=self.recipe.name)

    @property
    def log(self) -> str:
        """The end of what the driver printed, and how the job stands."""
        assert self.cluster is not None
        name = self.recipe.name
        text = str(self.cluster.jobs.get_job_logs(name))[-4000:]
        return f"{self.cluster.jobs.get_job_info(name)}\n{text}"

    def ended(self) -> str | None:
        """SUCCEEDED, FAILED or STOPPED; None: it still runs."""
        assert self.cluster is not None
        status = self.cluster.jobs.get_job_status(self.recipe.name)
        return str(status.value) if status.is_terminal() else None

    def succeed(self, seconds: float = 600) -> None:
        """Wait for its end, which must be a good one."""
        assert wait_until(self.ended, "at its end", self, seconds) == "SUCCEEDED", self.log
