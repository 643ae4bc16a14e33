"""Aliases that move only if gates hold, in a real MLflow store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from piflow.commands import promote
from piflow.config import Recipe, RegistryConfig, load_recipe
from piflow.evaluation.figures import Figures
from piflow.runs import folder as run_folder
from piflow.runs import tracking
from piflow.runs.folder import RunRecord
from piflow.runs.promotion import Registry
from piflow.runs.tracking import MlflowTracker
from tests.unit.evaluation.test_figures import made, with_networks
from tests.unit.test_cli import RECIPE, run_main

mlflow = pytest.importorskip("mlflow")

GATES = '["psnr_gain_db.low > -100", "psnr_over_champion_db.low > 0"]'


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.default_tracking_uri(str(tmp_path_factory.mktemp("store")))


@pytest.fixture
def client(uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def recipe(uri: str, tmp_path: Path) -> Recipe:
    """A run of the recipe, of a registered model of its own."""
    settings = {
        "run_dir": tmp_path / "run",
        "tracking.uri": uri,
        "tracking.model_name": tmp_path.name,
        "registry.gates": GATES,
    }
    made_ = load_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()])
    run_id = tracking.start(uri, "piflow", "emoji", {}, {})
    record = RunRecord(made_.hash(), made_.identity(), uri, run_id, "ab" * 32)
    run_folder.write_record(made_.run_dir, record)
    return made_


@pytest.fixture
def register(recipe: Recipe, client: Any) -> Callable[..., int]:
    """Registers the version of a checkpoint, with its figures unless there are none."""

    def register(step: int, figures: Figures | None, **tags: str) -> int:
        record = run_folder.require_run(recipe)
        name = run_folder.checkpoint_name(step)
        if figures is not None:
            place = f"evaluation/figures/{name}.json"
            file = Path(recipe.run_dir) / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(figures.model_dump_json())
            tracker = MlflowTracker(record.tracking_uri, record.mlflow_run_id, recipe.run_dir)
            tracker.log_artifact(place)
            assert tracker.close() is None
        model = str(recipe.tracking.model_name)
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model)
        known = {
            "piflow.recipe_hash": recipe.hash(),
            "piflow.checkpoint": name,
            "piflow.weights": "ema",
        }
        version = client.create_model_version(
            model, source="/nowhere", run_id=record.mlflow_run_id, tags=known | tags
        )
        return int(version.version)

    return register


def holder(client: Any, recipe: Recipe, alias: str = "champion") -> int | None:
    found = client.get_registered_model(recipe.tracking.model_name).aliases.get(alias)
    return None if found is None else int(found)


def tags(client: Any, recipe: Recipe, number: int) -> dict[str, str]:
    return dict(client.get_model_version(recipe.tracking.model_name, str(number)).tags)


def test_a_version_is_promoted_only_if_it_beats_the_champion(
    recipe: Recipe, client: Any, register: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    register(1, made())
    assert promote.main(recipe, dry_run=True) == 1
    assert holder(client, recipe) is None and "piflow.champion.at" not in tags(client, recipe, 1)
    assert "would move to version 1" in capsys.readouterr().out

    assert promote.main(recipe) == 1 and holder(client, recipe) == 1
    noted = tags(client, recipe, 1)
    assert noted["piflow.champion.before"] == "none" and noted["piflow.champion.forced"] == "false"
    assert noted["piflow.champion.by"] and noted["piflow.champion.at"].endswith("Z")
    why = noted["piflow.champion.why"]
    assert "no version has it yet" in why and "holds  psnr_gain_db.low > -100: " in why

    register(2, made(better=0.5))
    for options in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match=r"1 of 2 .* stays where it is: .*: 3.01 too low"):
            promote.main(recipe, **options)
    assert holder(client, recipe) == 1 and "piflow.champion.at" not in tags(client, recipe, 2)
    register(3, made(better=1.5))
    assert promote.main(recipe) == 3 and holder(client, recipe) == 3
    noted = tags(client, recipe, 3)
    assert (
        noted["piflow.champion.before"] == "1"
        and "version 1 has it" in noted["piflow.champion.why"]
    )
    capsys.readouterr()
    assert promote.main(recipe) == 3, "again: nothing to do"
    assert "is champion already" in capsys.readouterr().out
    assert tags(client, recipe, 3) == noted


def test_forced_promotions_say_so_and_rollbacks_go_further_back(
    recipe: Recipe, client: Any, register: Callable[..., int]
) -> None:
    for step, better in ((1, 1.0), (2, 1.5), (3, 0.5)):
        register(step, made(better=better))
    promote.main(recipe, version=1)
    promote.main(recipe, version=2)
    promote.main(recipe, force=True)
    noted = tags(client, recipe, 3)
    assert noted["piflow.champion.forced"] == "true"
    assert "FAILS  psnr_over_champion_db.low > 0: " in noted["piflow.champion.why"]
    promote.main(recipe, version=1, force=True)
    assert tags(client, recipe, 1)["piflow.champion.before"] == "3"

    for left, target in ((1, 3), (3, 2)):
        assert promote.roll_back(recipe) == target == holder(client, recipe)
        gone = tags(client, recipe, left)
        assert "piflow.champion.before" not in gone
        assert gone["piflow.champion.rolled_back"].endswith(f"to version {target}")
    assert promote.roll_back(recipe) == 1
    with pytest.raises(ValueError, match="the first that `piflow promote` gave the alias champion"):
        promote.roll_back(recipe)
    assert holder(client, recipe) == 1
    with pytest.raises(ValueError, match="no version of .* has the alias staging"):
        promote.roll_back(recipe, alias="staging")


def test_gates_of_networks_need_figures_by_the_same_weights(
    recipe: Recipe, client: Any, register: Callable[..., int]
) -> None:
    gates = ["clip_score_over_champion.low > 0.9", "fd_dinov2_teacher < 20"]
    asked = recipe.model_copy(update={"registry": RegistryConfig(gates=gates)})
    register(1, with_networks(made()))
    assert promote.main(asked) == 1
    register(2, with_networks(made(), more=1.0, clip_score="version 1, clip def"))
    with pytest.raises(ValueError, match="1 of 2 .* by version 1, clip def and by version 1, clip"):
        promote.main(asked)
    register(3, made())
    with pytest.raises(ValueError, match="fd_dinov2_teacher wasn't measured when it was evaluated"):
        promote.main(asked)
    register(4, with_networks(made(), more=0.5))
    with pytest.raises(ValueError, match="1 of 2 .*: 0.4 too low"):
        promote.main(asked)
    assert holder(client, asked) == 1
    register(5, with_networks(made(), more=1.0))
    assert promote.main(asked) == 5
    why = tags(client, asked, 5)["piflow.champion.why"]
    assert "holds  fd_dinov2_teacher < 20: 12.5\n" in f"{why}\n"


def test_aliases_have_histories_of_their_own(
    recipe: Recipe, client: Any, register: Callable[..., int]
) -> None:
    register(1, made())
    register(2, made(better=0.5))
    promote.main(recipe, version=1)
    assert promote.main(recipe, alias="staging") == 2, "no version has it, so none to beat"
    assert holder(client, recipe) == 1 and holder(client, recipe, "staging") == 2
    assert "piflow.champion.at" not in tags(client, recipe, 2)


def test_a_rollback_to_a_deleted_version(
    recipe: Recipe, client: Any, register: Callable[..., int]
) -> None:
    for step, better in ((1, 1.0), (2, 1.5)):
        register(step, made(better=better))
        promote.main(recipe)
    client.delete_model_version(recipe.tracking.model_name, "1")
    with pytest.raises(ValueError, match="version 1 of .*, which had champion .*, was deleted"):
        promote.roll_back(recipe)
    assert holder(client, recipe) == 2


def test_what_cant_be_judged_is_not_promoted(
    recipe: Recipe, client: Any, register: Callable[..., int]
) -> None:
    register(1, None)
    with pytest.raises(ValueError, match="version 1 .* wasn't evaluated: run `piflow evaluate`"):
        promote.main(recipe)
    register(2, made(), **{"piflow.weights": "student"})
    with pytest.raises(ValueError, match="doesn't hold the averaged weights"):
        promote.main(recipe)
    register(3, made(), **{"piflow.recipe_hash": "0" * 16})
    with pytest.raises(ValueError, match="version 3 .* is of another recipe"):
        promote.main(recipe, version=3)
    register(4, made(), **{"piflow.checkpoint": "../step_1"})
    with pytest.raises(ValueError, match=r"doesn't say from which checkpoint .*'\.\./step_1'"):
        promote.main(recipe)
    register(5, made(), **{"piflow.checkpoint_sha256": "1" * 64})
    with pytest.raises(ValueError, match="exported from another step_00000005 than the one that"):
        promote.main(recipe)
    with pytest.raises(ValueError, match="has no version 9; the newest are 5, 4, 3, 2, 1"):
        promote.main(recipe, version=9)
    assert holder(client, recipe) is None
    assert promote.main(recipe, version=1, force=True) == 1
    assert "can't be judged: version 1" in tags(client, recipe, 1)["piflow.champion.why"]

    register(6, made())
    with pytest.raises(ValueError, match="can't be judged: version 1, which has champion, has no"):
        promote.main(recipe)
    free = recipe.model_copy(update={"registry": recipe.registry.model_copy(update={"gates": []})})
    assert promote.main(free) == 6, "a recipe without gates asks for nothing"


def test_a_champion_of_other_prompts_or_another_reference(
    recipe: Recipe, client: Any, register: Callable[..., int]
) -> None:
    register(1, made())
    promote.main(recipe)
    register(2, made(better=2.0, first=6))
    with pytest.raises(ValueError, match="have 0 prompts in common and none from the same noise"):
        promote.main(recipe)
    register(3, made(better=2.0, reference={"guidance.scale": "4.0"}))
    with pytest.raises(ValueError, match="other references .guidance.scale: 4.0 and 3.5"):
        promote.main(recipe)
    register(4, made(better=2.0, first=3))
    assert promote.main(recipe) == 4, "three prompts in common"


def test_an_alias_that_somebody_else_moves_meanwhile(
    recipe: Recipe,
    client: Any,
    register: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step, better in ((1, 1.0), (2, 1.5), (3, 2.0)):
        register(step, made(better=better))
    promote.main(recipe, version=1)
    real = Registry.promote

    def late(self: Registry, *arguments: Any, **options: Any) -> None:
        client.set_registered_model_alias(recipe.tracking.model_name, "champion", "2")
        real(self, *arguments, **options)

    monkeypatch.setattr(Registry, "promote", late)
    with pytest.raises(ValueError, match="champion went from version 1 to 2 meanwhile: nothing"):
        promote.main(recipe)
    assert holder(client, recipe) == 2 and "piflow.champion.at" not in tags(client, recipe, 3)


def test_no_registered_model_and_no_run(
    recipe: Recipe, tmp_path: Path, client: Any, register: Callable[..., int]
) -> None:
    with pytest.raises(ValueError, match="has no registered model .*: `piflow export` makes one"):
        promote.main(recipe)
    register(1, made(), **{"piflow.recipe_hash": "0" * 16})
    with pytest.raises(ValueError, match="no version of .* is of this recipe"):
        promote.main(recipe)
    elsewhere = recipe.model_copy(update={"run_dir": str(tmp_path / "away")})
    with pytest.raises(ValueError, match="no version of .* is of this recipe"):
        promote.main(elsewhere)  # by tracking.uri alone
    nowhere = elsewhere.model_copy(update={"tracking": load_recipe(RECIPE).tracking})
    with pytest.raises(ValueError, match="no run in .*away; start it"):
        promote.main(nowhere)


class _NoRegistry(BaseHTTPRequestHandler):
    """Answers 404, as servers of MLflow's tracking alone do for what they don't have."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def without_registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoRegistry) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_exit_codes_of_the_command(
    recipe: Recipe,
    register: Callable[..., int],
    without_registry: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """0: moved; 1: a gate fails, no registry; 2: a reserved alias; 75: the server is away."""
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())

    def run(*arguments: str) -> tuple[int, str]:
        code = run_main(*arguments, monkeypatch=monkeypatch)
        return code, " ".join(capsys.readouterr().err.split())

    register(1, made())
    assert run("promote", str(file), "--alias", "staging")[0] == 0
    register(2, made(better=0.5))
    code, told = run("promote", str(file), "--alias", "staging", "--dry-run")
    assert code == 1 and "1 of 2 gates don't hold, staging stays where it is" in told
    assert run("promote", str(file), "--alias", "staging", "--force")[0] == 0
    assert run("rollback", str(file), "--alias", "staging")[0] == 0
    for alias in ("latest", "v7"):
        for command in ("promote", "rollback"):
            code, told = run(command, "no-such-recipe.yaml", "--alias", alias)
            assert code == 2 and "MLflow reserves the alias" in told

    away = ["--set", f"run_dir={tmp_path / 'away'}", "--set"]
    code, told = run("promote", str(file), *away, f"tracking.uri={without_registry}")
    assert code == 1 and f"the MLflow server {without_registry} has no model registry" in told
    monkeypatch.setattr("piflow.runs.mlflow.START_SECONDS", 0.0)
    code, told = run("promote", str(file), *away, "tracking.uri=http://127.0.0.1:9")
    assert code == 75 and "start it, or check tracking.uri" in told
