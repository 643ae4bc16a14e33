"""A real Prometheus that scrapes a real run answers every query of the dashboard.

Real: Ray's head with token authentication, which lists the machines; a distillation of a tiny model
on two workers; Prometheus with the configuration and the alerts that we ship. Changed are how often
numbers are reported and scraped, and Ray's folder. What only a GPU reports isn't asked for here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from piflow.runs import folder as run_folder
from tests.faults.runs import SmallRun, make_store, small_recipe, wait_until
from tests.monitoring import INFRA, is_of_gpus, queries
from tests.servers import RayServer, Server, free_ports

BATCH = 4
WINDOW = "40s"  # of rates; processes report every 4 s
HOST = "127.0.0.1"
LIST = "prom_metrics_service_discovery.json"


@dataclass
class Head(RayServer):
    """One machine with Ray, its dashboard and its page of metrics."""

    ports: list[int] = field(default_factory=lambda: free_ports(4))

    @property
    def address(self) -> str:
        return f"{HOST}:{self.ports[0]}"

    def command(self) -> list[str]:
        port, dashboard, agent, page = self.ports
        return [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            f"--node-ip-address={HOST}", f"--port={port}", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={page}",
            f"--temp-dir={self.folder}", "--num-cpus=4", "--num-gpus=0",
            f"--object-store-memory={200 * 2**20}",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return ray_environment(self.folder)

    def answers(self) -> bool:
        """Whether somebody without a token can read the page, and the list of machines is there."""
        try:
            page = urllib.request.urlopen(f"http://{HOST}:{self.ports[3]}/metrics", timeout=5)
        except OSError:
            return False
        return page.status == 200 and (self.folder / LIST).exists()


def ray_environment(home: Path) -> dict[str, str]:
    """Of Ray and of drivers; a user's own settings don't reach them."""
    return {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "4000",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Prometheus(Server):
    """With the shipped configuration, but for times and Ray's folder."""

    ray: Path = Path()
    port: int = field(default_factory=lambda: free_ports(1)[0])

    def command(self) -> list[str]:
        tree = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
        tree["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
        (job,) = tree["scrape_configs"]
        job["file_sd_configs"] = [{"files": [str(self.ray / LIST)], "refresh_interval": "2s"}]
        shutil.copy(INFRA / "prometheus" / "alerts.yaml", self.folder)
        (self.folder / "prometheus.yaml").write_text(yaml.safe_dump(tree))
        return [
            "prometheus", f"--config.file={self.folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        try:
            return bool(self._get("/-/ready"))
        except OSError:
            return False

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=10) as reply:
            return bytes(reply.read())

    def ask(self, query: str) -> dict[tuple[str, ...], float]:
        """Numbers by their labels' values, as ordered by the labels' names; NaN is no answer."""
        path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
        reply = json.loads(self._get(path))
        assert reply["status"] == "success", reply
        found = {
            tuple(value for _, value in sorted(item["metric"].items())): float(item["value"][1])
            for item in reply["data"]["result"]
        }
        return {labels: value for labels, value in found.items() if not math.isnan(value)}

    def rules(self) -> dict[str, dict[str, Any]]:
        groups = json.loads(self._get("/api/v1/rules"))["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # sockets' paths have at most 107 letters
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with Head(Path(folder)).running() as head:
            yield head


@pytest.fixture(scope="module")
def prometheus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(folder, ray=head.folder).running() as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def run(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    """A run of two workers that goes on until it is killed."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | ray_environment(head.folder) | {"RAY_ADDRESS": head.address}
    make_store(folder, environment)
    recipe = small_recipe(
        folder,
        "watched",
        model={"fp8_teacher": {"check_every": 5, "max_error": 10.0}},
        runtime={"peak_tflops": 0.1},
        tracking={"system_metrics": True},
        training={"steps": 100_000, "checkpoint_every": 10, "log_every": 1},
    )
    run = SmallRun(folder, recipe, environment, pace=0.2)
    with run.running():
        wait_until(lambda: run.last_step() > 10, "training", run)
        yield run


@pytest.mark.timeout(600)
def test_every_panel_is_answered(prometheus: Prometheus, run: SmallRun) -> None:
    waiting = [(title, query) for title, query in queries(WINDOW) if not is_of_gpus(query)]
    assert len(waiting) > 20

    def all_answered() -> bool:
        waiting[:] = [(title, query) for title, query in waiting if not prometheus.ask(query)]
        return not waiting

    try:
        wait_until(all_answered, "answered", run, seconds=300)
    except AssertionError as error:
        pytest.fail(f"no answer to {waiting}; {error}")
    assert prometheus.ask("ray_piflow_images_totals") == {}, "what isn't exported has no answer"


@pytest.mark.timeout(600)
def test_the_numbers_are_the_runs(prometheus: Prometheus, run: SmallRun) -> None:
    def answer(query: str) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = wait_until(
            lambda: prometheus.ask(query), query, run, seconds=300
        )
        return found

    answer("ray_piflow_step > 60")
    steps = answer("sum by (rank) (ray_piflow_steps_total)")
    images = answer("sum by (rank) (ray_piflow_images_total)")
    assert steps.keys() == images.keys() == {("0",), ("1",)}
    # a worker counts its own part of a batch; workers report at different times
    assert sum(images.values()) / BATCH == pytest.approx(max(steps.values()), rel=0.3)
    told = answer(f"sum by (rank) (rate(ray_piflow_step_seconds_total[{WINDOW}]))")
    assert told.keys() == steps.keys()
    assert all(0.6 < seconds < 1.4 for seconds in told.values()), "a second's parts make a second"
    flops = f"sum(rate(ray_piflow_flops_total[{WINDOW}]))"
    (busy,) = answer(f"{flops} / sum(ray_piflow_peak_flops)").values()
    assert 0 < busy < 1
    (loss,) = answer("ray_piflow_loss").values()
    (age,) = answer("time() - ray_piflow_checkpoint_timestamp_seconds").values()
    assert loss > 0 and -5 < age < 300
    assert set(answer("count by (NodeAddress, run) (ray_piflow_steps_total)")) == {
        (HOST, "watched")
    }
    assert prometheus.ask('{otel_scope_name!="", run="watched"}') == {}, "dropped labels"


@pytest.mark.timeout(600)
def test_mlflow_has_the_machines_metrics_by_its_address(run: SmallRun) -> None:
    from mlflow import MlflowClient

    record = run_folder.read_record(run.recipe.run_dir)
    assert record is not None
    client = MlflowClient(tracking_uri=record.tracking_uri)
    key = f"system/{HOST}/cpu_utilization_percentage"

    def points() -> list[Any]:
        return list(client.get_metric_history(record.mlflow_run_id, key))

    steps = [point.step for point in wait_until(points, "in MLflow", run, seconds=300)]
    assert steps == sorted(set(steps))


@pytest.mark.timeout(600)
def test_a_killed_worker_is_told(prometheus: Prometheus, run: SmallRun) -> None:
    rules = prometheus.rules()
    assert len(rules) == 9 and {rule["health"] for rule in rules.values()} == {"ok"}
    assert rules["PiflowWorkerLost"]["state"] == "inactive"
    os.kill(workers(run)[-1], signal.SIGKILL)

    def is_firing() -> bool:
        return bool(prometheus.rules()["PiflowWorkerLost"]["state"] == "firing")

    wait_until(is_firing, "told", run, seconds=300)
    query = "sum by (kind) (ray_piflow_worker_failures_total) > 0.5"
    assert prometheus.ask(query) == {("failed",): 1}


def workers(run: SmallRun) -> list[int]:
    """Process ids of the run's workers, by what they note."""
    pids = [int(file.stem.removeprefix("steps-")) for file in run.records.glob("steps-*.jsonl")]
    return [pid for pid in pids if psutil.pid_exists(pid)]
