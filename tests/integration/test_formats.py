"""Files of the version before are read, and mean the same: recipes, stores, runs, adapters.

`tests/golden/formats` holds a run that was stopped in the middle, two stores, three adapters and
what the version that wrote them makes of them; `tests/golden/make_formats.py` says how. A copy of
it is used here, in another place than the files name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from piflow import storage
from piflow.commands import distill, embed
from piflow.config import Recipe, load_recipe
from piflow.data.reader import EmbeddingStore
from piflow.roles.adapter import load_adapter
from piflow.runs import folder as run_folder
from piflow.runs.tracking import BUFFER, default_tracking_uri, start
from piflow.training.checkpoint import load_state, load_tensors, verify_checkpoint
from piflow.training.export import export_adapter
from piflow.training.preflight import preflight
from tests.golden import format_results as results
from tests.golden.shipped import values_of_then

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "formats"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())

# What may be off: more than other instruction sets and kinds of CPU make of it (losses 5e-6,
# velocities 5e-5). A checkpoint without its optimiser or its average, or an adapter without LoRA,
# is off by 1e-4 and more.
WEIGHTS = 1e-6
LOSSES = 1e-5  # relative
DRAWN = 8e-5  # velocities, latents, pictures

# minutes are for loaded machines
pytestmark = pytest.mark.timeout(600)


@cache
def expected_tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def expected_under(prefix: str) -> dict[str, Tensor]:
    """The expected tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in expected_tensors().items()
        if name.startswith(prefix)
    }


def expected_weights() -> dict[str, Tensor]:
    """Trained weights and their averages after the run's last step."""
    found = expected_under("gm.")
    return {key: value for key, value in found.items() if key.startswith(("trainable.", "ema."))}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    off = {
        name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs
    }
    assert max(off.values()) <= tolerance, sorted(off.items(), key=lambda item: -item[1])[:3]


@pytest.fixture
def gm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of the stopped run; the working directory is a copy of where it was made."""
    return copied("gm", tmp_path, monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of the store with pictures' latents, in the same way."""
    return copied("pictures", tmp_path, monkeypatch)


def copied(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    monkeypatch.chdir(folder)
    return load_recipe("recipe.yaml")


# ---------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", EXPECTED["recipes"])
def test_a_recipe_is_that_of_its_runs(name: str) -> None:
    """By the hash alone, which is all that a checkpoint of then has."""
    old = load_recipe(GOLDEN / "recipes" / f"{name}.yaml", ["schema_version=0"])
    assert old.is_run_of(EXPECTED["recipes"][name])


@pytest.mark.parametrize("name", EXPECTED["recipes"])
def test_a_shipped_recipe_is_still_there_and_the_same(name: str) -> None:
    """A run that was started with it can be resumed by the file of the same name.

    Where the base is bfloat16, with LoRA computed in float32 as it was then; and with the values
    of then, where the file has taken over published ones.
    """
    file = REPOSITORY / "pipelines" / "recipes" / f"{name}.yaml"
    version, *values = values_of_then(name)
    assert load_recipe(file, [version, *values]).is_run_of(EXPECTED["recipes"][name])
    today = load_recipe(file)
    same = today.model.dtype == "float32" and not values
    assert today.is_run_of(EXPECTED["recipes"][name]) == same


def test_identity_is_recognised(gm: Recipe) -> None:
    """The record's by itself, a checkpoint's by the hash; another recipe's by neither."""
    other = load_recipe(GOLDEN / "pictures" / "recipe.yaml")
    assert gm.is_run_of(EXPECTED["gm"]["recipe_hash"])
    assert other.is_run_of(EXPECTED["pictures"]["recipe_hash"])
    assert not other.is_run_of(EXPECTED["gm"]["recipe_hash"])
    assert gm.is_run_of("another hash", EXPECTED["gm"]["identity"])
    assert gm.differences(EXPECTED["gm"]["identity"]) == []
    other = gm.model_copy(update={"seed": 5})
    assert not other.is_run_of(EXPECTED["gm"]["recipe_hash"], EXPECTED["gm"]["identity"])
    assert other.differences(EXPECTED["gm"]["identity"]) == ["seed: 5 here, 3 there"]


# ----------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("name", ["gm", "pictures"])
def test_store_is_read(name: str, request: pytest.FixtureRequest) -> None:
    """It fits the recipe's encoder and VAE, is whole, and its rows are the same to the bit."""
    recipe = request.getfixturevalue(name)
    store = preflight(recipe).store
    assert store.manifest_hash == EXPECTED[name]["manifest_hash"]
    assert store.manifest.inputs.digest == EXPECTED[name]["inputs_sha256"]
    embed.verify(recipe)
    assert_close(results.decoded("store"), expected_under(f"{name}.store."), 0)


def test_stores_differ_in_what_they_hold(gm: Recipe, pictures: Recipe, tmp_path: Path) -> None:
    """So both formats of a manifest and both of token states are among them."""
    inputs = [
        EmbeddingStore.open(str(tmp_path / name / "store")).manifest.inputs
        for name in ("gm", "pictures")
    ]
    assert [(one.schema_version, one.dtype) for one in inputs] == [(2, "fp8"), (3, "bf16")]
    assert [one.latents is not None for one in inputs] == [False, True]


@pytest.mark.parametrize("name", ["gm", "pictures"])
def test_store_is_kept(name: str, request: pytest.FixtureRequest) -> None:
    """Embedding has nothing to do; and without a manifest, no file of it is made anew."""
    recipe = request.getfixturevalue(name)
    before = {path.name: path.read_bytes() for path in Path("store").iterdir()}
    assert embed.main(recipe, show_progress=False) == EmbeddingStore.open("store").manifest
    Path("store", "manifest.json").unlink()
    embed.main(recipe, show_progress=False)
    # written by this version, whose JSON may have more keys: its meaning is the same
    assert EmbeddingStore.open("store").manifest_hash == EXPECTED[name]["manifest_hash"]
    after = {path.name: path.read_bytes() for path in Path("store").iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "manifest.json")


# ----------------------------------------------------------------------------- run and checkpoint


def test_run_folder_is_read(gm: Recipe) -> None:
    record = run_folder.require_run(gm)
    run_folder.require_same_store(gm, record, EXPECTED["gm"]["manifest_hash"])
    assert record.recipe_hash == EXPECTED["gm"]["recipe_hash"]
    assert record.identity == EXPECTED["gm"]["identity"]
    assert record.mlflow_run_id == EXPECTED["gm"]["mlflow_run_id"]
    assert record.tracking_uri == f"sqlite:///{results.ROOT}/gm/run/mlflow.db"
    assert list(run_folder.checkpoints(gm.run_dir)) == [results.STOPPED_AT]


def test_checkpoint_is_read(gm: Recipe) -> None:
    folder = Path(run_folder.newest_checkpoint(gm.run_dir))
    state = verify_checkpoint(folder)
    found = {"step": state.step, "samples": state.samples, "loss": state.loss}
    assert found == EXPECTED["gm"]["checkpoint"]
    assert gm.is_run_of(state.recipe_hash, state.identity)
    assert state.mlflow_run_id == EXPECTED["gm"]["mlflow_run_id"]
    for section in ("trainable", "ema"):
        assert load_tensors(folder, section).keys() == expected_under(f"gm.{section}.").keys()


def test_training_goes_on(gm: Recipe) -> None:
    """From the checkpoint on: the same prompts, losses, weights and averages."""
    trained = results.train(gm)
    assert trained.start == results.STOPPED_AT
    assert trained.prompt_ids == EXPECTED["gm"]["prompt_ids"]
    assert trained.losses == pytest.approx(EXPECTED["gm"]["losses"], rel=LOSSES)
    assert_close(trained.weights, expected_weights(), WEIGHTS)


def test_training_on_latents_of_the_store(pictures: Recipe) -> None:
    """A new run on an old store with pictures is the run that the version before would do."""
    trained = results.train(load_recipe("recipe.yaml", results.GENTLE))
    assert trained.start == 0
    assert trained.prompt_ids == EXPECTED["pictures"]["prompt_ids"]
    assert trained.losses == pytest.approx(EXPECTED["pictures"]["losses"], rel=LOSSES)


@pytest.fixture
def tracked(gm: Recipe) -> Iterator[tuple[Any, str]]:
    """MLflow's client and a fresh run of it, which the golden run's record names from now on.

    Its database is MLflow's own format, and would be in another place than the record says.
    """
    from mlflow import MlflowClient

    uri = default_tracking_uri(gm.run_dir)
    run_id = start(uri, gm.tracking.experiment, gm.name, {}, {})
    file = Path(gm.run_dir, "run.json")
    record = json.loads(file.read_text()) | {"tracking_uri": uri, "mlflow_run_id": run_id}
    file.write_text(json.dumps(record))
    yield MlflowClient(tracking_uri=uri, registry_uri=uri), run_id


@pytest.mark.usefixtures("ray_cluster")
def test_run_goes_on(gm: Recipe, tracked: tuple[Any, str]) -> None:
    """By `piflow distill`; and what was kept for MLflow, while it was away, is delivered."""
    client, run_id = tracked
    assert distill.main(gm, show_progress=False) == gm.training.steps
    newest = storage.local_folder(run_folder.newest_checkpoint(gm.run_dir))
    state, record = load_state(newest), run_folder.require_run(gm)
    assert state.step == gm.training.steps
    assert record.identity == state.identity == gm.identity(), "from now on in today's form"
    weights = {
        f"{section}.{name}": tensor
        for section in ("trainable", "ema")
        for name, tensor in load_tensors(newest, section).items()
    }
    assert_close(weights, expected_weights(), WEIGHTS)
    points = client.get_metric_history(run_id, "loss")
    assert [point.step for point in points] == [3, 4]
    losses = [point.value for point in points]
    assert losses == pytest.approx(EXPECTED["gm"]["losses"], rel=LOSSES)
    [kept] = client.get_metric_history(run_id, "kept_while_away")
    assert (kept.step, kept.value) == (results.STOPPED_AT, 0.5)
    assert client.get_run(run_id).data.tags["event.kept"] == "while the server was away"
    assert not storage.list_files(storage.join(gm.run_dir, BUFFER))


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("name", "adapter", "folder"),
    [("gm", "adapter", "run/adapter"), ("pictures", "grid", "grid"),
     ("pictures", "polynomial", "polynomial")],
)  # fmt: skip
def test_adapter_draws_the_same(
    name: str, adapter: str, folder: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    noise = expected_tensors()[f"{name}.noise"]
    drawn = results.draw(folder, "model/transformer", "store", noise)
    expected = expected_under(f"{name}.{adapter}.")
    expected.pop("pipeline", None)
    assert_close(drawn, expected, DRAWN)


@pytest.mark.parametrize("adapter", ["grid", "polynomial"])
def test_adapter_draws_the_same_in_diffusers(adapter: str, pictures: Recipe) -> None:
    noise = expected_tensors()["pictures.noise"]
    drawn = results.draw_by_pipeline(adapter, "model", noise)
    assert_close({"": drawn}, {"": expected_tensors()[f"pictures.{adapter}.pipeline"]}, DRAWN)


@pytest.mark.parametrize(
    ("name", "folder", "encoder"), [("gm", "run/adapter", "model/encoder"),
                                    ("pictures", "grid", "model")],
)  # fmt: skip
def test_adapter_names_its_encoder(
    name: str, folder: str, encoder: str, request: pytest.FixtureRequest
) -> None:
    """And the base, where both were; from another place the encoder says the same."""
    request.getfixturevalue(name)
    assert load_adapter(folder).metadata["base_model"] == (
        f"{results.ROOT}/{name}/model/transformer"
    )
    settings = results.student_settings(folder, "model/transformer", encoder)
    cond = results.text_conditioning(settings)
    found = {"tokens": cond.tokens, "num_tokens": cond.num_tokens}
    if cond.pooled is not None:
        found["pooled"] = cond.pooled
    assert_close(found, expected_under(f"{name}.encoder."), DRAWN)


def test_checkpoint_is_exported(gm: Recipe) -> None:
    """As the version before did: the same tensors under the same names."""
    checkpoint = run_folder.newest_checkpoint(gm.run_dir)
    export_adapter(gm, checkpoint, "again", weights="ema", dtype="bfloat16", lineage={})
    before, after = load_adapter("run/adapter"), load_adapter("again")
    assert after.config == before.config
    assert_close(after.tensors, before.tensors, 0)
    assert {name: tensor.dtype for name, tensor in after.tensors.items()} == {
        name: tensor.dtype for name, tensor in before.tensors.items()
    }
