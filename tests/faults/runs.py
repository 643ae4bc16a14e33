"""Small distillations in processes of their own, on a cluster that outlives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from piflow import storage
from piflow.commands import smoke
from piflow.config import Recipe, load_recipe, parse_recipe
from piflow.runs import folder as run_folder
from piflow.testing import shrink
from piflow.training.checkpoint import load_tensors

SCRIPT = Path(__file__).parent / "recorded_distill.py"
REPOSITORY = Path(__file__).parents[2]
PROMPTS = 24
MICRO_BATCHES = 4  # a step, of one prompt each


def small_recipe(folder: Path, name: str, **sections: dict[str, Any]) -> Recipe:
    """A tiny random FLUX on two workers; `sections` replace keys of the recipe's sections."""
    base = load_recipe(REPOSITORY / "pipelines" / "recipes" / "emoji-flux.yaml")
    tree = shrink.shrink(base, folder, gpus=0).model_dump(mode="json")
    tree |= {"name": name, "run_dir": str(folder / name)}
    tree["training"] |= {"batch_size": MICRO_BATCHES, "micro_batch_size": 1, "sample_every": 0}
    tree["embed"] |= {"rows_per_shard": 8, "rows_per_group": 4}
    tree["runtime"] |= {"num_workers": 2, "strategy": "fsdp", "cpus_per_worker": 1}
    for section, keys in sections.items():
        tree[section] |= keys
    return parse_recipe(tree)


def write_inputs(folder: Path) -> None:
    """The tiny model and the prompts of all runs in the folder."""
    smoke.write_inputs(small_recipe(folder, "inputs"), folder)
    rows = [json.dumps({"prompt": f"picture {number}"}) for number in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def make_store(folder: Path, environment: dict[str, str]) -> None:
    """`write_inputs`, and the embedding store of all runs in the folder."""
    write_inputs(folder)
    embed(SmallRun(folder, small_recipe(folder, "inputs"), environment))


def embed(run: SmallRun) -> None:
    """The embedding store of the run's recipe."""
    run.write_recipe()
    command = "from piflow.cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", command, "embed", str(run.recipe_file), "--quiet"],
        env=run.environment, check=True, timeout=600,
    )  # fmt: skip


@dataclass
class SmallRun:
    """One run; each `start` is the same command again."""

    folder: Path
    recipe: Recipe
    environment: dict[str, str]
    pace: float = 0.0  # seconds a step takes at least

    @property
    def records(self) -> Path:
        return self.folder / f"{self.recipe.name}-records"

    @property
    def log(self) -> str:
        """The end of what the drivers printed."""
        return (self.folder / f"{self.recipe.name}.log").read_text()[-4000:]

    @property
    def recipe_file(self) -> Path:
        return self.folder / f"{self.recipe.name}.json"  # JSON is YAML

    def write_recipe(self) -> None:
        self.recipe_file.write_text(self.recipe.model_dump_json())

    @property
    def command(self) -> list[str]:
        """Of the driver."""
        arguments = [str(self.recipe_file), str(self.records), str(self.pace)]
        return [sys.executable, str(SCRIPT), *arguments]

    def prepare(self) -> None:
        """Write what the driver reads."""
        self.records.mkdir(exist_ok=True)
        self.write_recipe()

    def start(self) -> subprocess.Popen[bytes]:
        self.prepare()
        with (self.folder / f"{self.recipe.name}.log").open("ab") as log:
            return subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """A driver that is gone afterwards."""
        process = self.start()
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
        assert process.wait(seconds) == 0, self.log

    def lines(self) -> list[dict[str, Any]]:
        """What the workers noted, in the order of the files' last changes."""
        files = sorted(self.records.glob("steps-*.jsonl"), key=lambda file: file.stat().st_mtime)
        texts = [line for file in files for line in file.read_text().split("\n")]
        return [json.loads(text) for text in texts if text.endswith("}")]

    def last_step(self) -> int:
        """Number of the highest step that a worker came to; -1 before the first."""
        return max((line["step"] for line in self.lines()), default=-1)

    def sequence(self) -> list[list[str]]:
        """Prompt ids of every step; whoever trained on it and however often, they were the same."""
        steps: dict[int, dict[str, list[str]]] = {}
        for line in self.lines():
            for index, ids in line["ids"].items():
                known = steps.setdefault(line["step"], {}).setdefault(index, ids)
                assert known == ids, f"step {line['step']} had other prompts when it was repeated"
        assert sorted(steps) == list(range(len(steps)))
        assert all(len(parts) == MICRO_BATCHES for parts in steps.values())
        return [
            [prompt for index in sorted(parts, key=int) for prompt in parts[index]]
            for _, parts in sorted(steps.items())
        ]

    def weights(self) -> dict[str, Tensor]:
        """Trained weights and averages of the last step's checkpoint."""
        uri = run_folder.checkpoints(self.recipe.run_dir)[self.recipe.training.steps]
        folder = storage.local_folder(uri)
        sections = {name: load_tensors(folder, name) for name in ("trainable", "ema")}
        return {
            f"{name} {key}": value for name, part in sections.items() for key, value in part.items()
        }

    def events(self) -> list[tuple[str, str]]:
        """(name, text) of all events that MLflow has, oldest first."""
        client, run_id = self._client()
        names = sorted(item.path for item in client.list_artifacts(run_id, "events"))
        return [
            (
                name.removesuffix(".txt").rpartition("Z-")[2],
                Path(client.download_artifacts(run_id, name)).read_text(),
            )
            for name in names
        ]

    def names(self) -> list[str]:
        """Of the events."""
        return [name for name, _ in self.events()]

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) points as MLflow has them."""
        client, run_id = self._client()
        return [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]

    def status(self) -> str:
        client, run_id = self._client()
        return str(client.get_run(run_id).info.status)

    def _client(self) -> tuple[Any, str]:
        from mlflow import MlflowClient

        record = run_folder.read_record(self.recipe.run_dir)
        assert record is not None
        return MlflowClient(tracking_uri=record.tracking_uri), record.mlflow_run_id


def require_equal(run: SmallRun, straight: SmallRun, *, tolerance: float = 0.0) -> None:
    """The uninterrupted run's prompts, losses and weights, and a step axis without a gap."""
    assert run.status() == "FINISHED"
    assert run.sequence() == straight.sequence()
    points, expected = run.losses(), straight.losses()
    assert [step for step, _ in points] == list(range(1, straight.recipe.training.steps + 1))
    assert [loss for _, loss in points] == pytest.approx(
        [loss for _, loss in expected], rel=max(1e-6, tolerance)
    )
    ours, theirs = run.weights(), straight.weights()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance)


def train_workers() -> list[int]:
    """Process ids of Ray Train's workers on this process's clusters."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:  # it ended meanwhile
            continue
    return sorted(found)


def wait_until(
    condition: Callable[[], Any], what: str, run: SmallRun | None = None, seconds: float = 300
) -> Any:
    """What the condition returns once it is true."""
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"not {what} within {seconds:.0f} s: {run and run.log}"
        time.sleep(0.05)


def cluster_environment(address: str) -> dict[str, str]:
    """Variables of a driver on the cluster."""
    return {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}


@contextmanager
def cluster_of(num_cpus: int) -> Iterator[Any]:
    """A Ray cluster of a head with so many logical CPUs; its `address` is what drivers need."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": num_cpus, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()
