"""What makes two recipes the same run, in this version and across versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piflow.config import Recipe, RecipeError, TrainingConfig, identity, load_recipe, parse_recipe
from piflow.config.identity import changed_values, deciding_values, migrate
from piflow.config.section import Operational, Section
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunDirectoryError, RunRecord, require_same_recipe
from tests.golden.make_recipe_schema import GOLDEN, schema
from tests.golden.shipped import values_of_then

REPOSITORY = Path(__file__).parents[3]
RECIPES = REPOSITORY / "pipelines" / "recipes"
HASHES = json.loads((GOLDEN.parent / "recipe_hashes_of_schema_0.json").read_text())
MINIMAL: dict[str, Any] = {
    "name": "test",
    "run_dir": "run",
    "model": {"path": "teacher"},
    "encoder": {"path": "encoder"},
    "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
}
OLD_CLASSES = "package://pipelines/recipes/imagenet_classes.txt"
NEW_CLASSES = "package://piflow.backbones.dit/imagenet_classes.txt"


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({**MINIMAL, **sections})


# ------------------------------------------------------------------------------- what is part of it


class Inner(Section):
    size: int = 3
    speed: Operational[int] = 1


class Outer(Section):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: list[Inner] = []
    length: Operational[int | None] = None


def test_operational_keys_and_defaults_are_left_out() -> None:
    assert changed_values(Outer(name="a")) == {"name": "a"}
    busy = Outer(name="a", inner=Inner(speed=9), length=4)
    assert changed_values(busy) == {"name": "a"}, "however fast or long"
    assert changed_values(Outer(name="a", inner=Inner(size=4, speed=9))) == {
        "name": "a", "inner": {"size": 4},
    }  # fmt: skip


def test_a_section_in_place_of_none_counts_even_with_its_defaults() -> None:
    assert changed_values(Outer(name="a", maybe=Inner())) == {"name": "a", "maybe": {}}
    assert changed_values(Outer(name="a", many=[Inner(speed=2)])) == {
        "name": "a", "many": [{"size": 3}],
    }  # fmt: skip


def test_deciding_values_have_the_defaults_too() -> None:
    assert deciding_values(Outer(name="a")) == {
        "name": "a", "inner": {"size": 3}, "maybe": None, "many": [],
    }  # fmt: skip


def test_another_variant_is_named() -> None:
    assert "policy" not in recipe().identity()
    assert recipe(policy={"type": "dx"}).identity()["policy"] == {"type": "dx"}
    assert recipe(lora=None).identity()["lora"] is None


def test_a_new_key_with_its_default_changes_no_hash() -> None:
    class LaterTraining(TrainingConfig):
        new_key: int = 5

    class LaterRecipe(Recipe):
        training: LaterTraining = LaterTraining()

    assert LaterRecipe.model_validate(MINIMAL).hash() == recipe().hash()
    changed = LaterRecipe.model_validate({**MINIMAL, "training": {"new_key": 6}})
    assert changed.identity()["training"] == {"new_key": 6}
    assert changed.hash() != recipe().hash()


def test_a_changed_default_needs_a_new_schema_version() -> None:
    """With it a migration that writes the old default out; a new key needs neither."""
    golden, found = json.loads(GOLDEN.read_text()), schema()
    for section, defaults in golden["defaults"].items():
        kept = {key: found["defaults"].get(section, {}).get(key) for key in defaults}
        assert kept == defaults or found["schema"] > golden["schema"], (
            f"{section}: a default changed, or a key went, without a new schema version: raise "
            "SCHEMA in piflow/config/identity.py, and add a function to MIGRATIONS there that "
            "writes the old default into an older tree, or renames or drops the key"
        )
    assert found == golden, (
        "keys or the schema version are new: write them down by `python -m "
        "tests.golden.make_recipe_schema`; a new key that decides results also goes into "
        "SINCE_SCHEMA_0 in piflow/config/identity.py, as long as checkpoints of then are read"
    )


# -------------------------------------------------------------------------------- across versions


@pytest.mark.parametrize("name", HASHES)
def test_runs_of_version_0_1_0_are_recognised_by_their_hash(name: str) -> None:
    def of_then(*changes: str) -> Recipe:
        return load_recipe(RECIPES / f"{name}.yaml", [*values_of_then(name), *changes])

    assert of_then().is_run_of(HASHES[name])
    assert not of_then("seed=77").is_run_of(HASHES[name])
    assert of_then("training.keep_last=7", "run_dir=elsewhere").is_run_of(HASHES[name])


@pytest.mark.parametrize("name", ["emoji-flux", "flux1-dev-gm-4nfe"])
def test_lora_on_a_bfloat16_base_was_computed_in_float32(name: str) -> None:
    """A float32 base means the same in both schemas."""
    version, *values = values_of_then(name)
    today = load_recipe(RECIPES / f"{name}.yaml", values)
    then = load_recipe(RECIPES / f"{name}.yaml", [version, *values])
    stored = {**then.identity(), "schema_version": 1}
    if today.model.dtype == "bfloat16":  # schema 1 had no such key
        stored["lora"] = {
            key: value for key, value in stored["lora"].items() if key != "compute_dtype"
        }
    assert then.is_run_of("another hash", stored)
    same = today.model.dtype == "float32"
    assert today.is_run_of("another hash", stored) == same
    assert today.is_run_of(HASHES[name]) == same
    changed = [] if same else ["lora.compute_dtype: 'base' here, 'float32' there"]
    assert today.differences(stored) == changed


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_polynomial_was_one_of_the_velocity(version: int) -> None:
    """Until schema 3; since, `polynomial` is the published one, which is another policy."""
    policy = {"type": "dx", "mode": "polynomial", "num_points": 3}
    then, today = recipe(schema_version=version, policy=policy), recipe(policy=policy)
    assert (then.policy.mode, today.policy.mode) == ("velocity_polynomial", "polynomial")
    assert recipe(schema_version=version, policy={"type": "dx"}) == recipe(policy={"type": "dx"})
    stored = {**then.identity(), "policy": policy, "schema_version": version}
    if version == 0:
        stored = identity.as_in_schema_0(then.deciding(), then.identity())
        assert stored["policy"]["mode"] == "polynomial"
        assert then.is_run_of(identity.hash_of(stored)), "a checkpoint of 0.1.0 has a hash alone"
        assert not today.is_run_of(identity.hash_of(stored))
    assert then.is_run_of("another hash", stored) and not today.is_run_of("another hash", stored)
    difference = "policy.mode: 'polynomial' here, 'velocity_polynomial' there"
    assert today.differences(stored) == [difference]


def test_an_old_record_goes_on_and_a_difference_is_named(tmp_path: Path) -> None:
    """Version 0.1.0 stored the whole identity."""
    ours = recipe(run_dir=str(tmp_path))
    old = identity.as_in_schema_0(ours.deciding(), ours.identity())
    record = RunRecord(identity.hash_of(old), old, "sqlite:///x", "run", "manifest")
    run_folder.write_record(str(tmp_path), record)
    assert require_same_recipe(ours) == record
    other = recipe(run_dir=str(tmp_path), seed=5, lora={"rank": 8})
    with pytest.raises(
        RunDirectoryError, match=r"(?s)lora.rank: 8 here, 256 there.*seed: 5 here, 0"
    ):
        require_same_recipe(other)


def test_an_old_identity_is_migrated_whatever_its_hash() -> None:
    """So a key that was renamed or has come since doesn't matter to it."""
    ours = recipe(embed={**MINIMAL["embed"], "prompts": NEW_CLASSES})
    old = {**ours.deciding(), "embed": {**ours.deciding()["embed"], "prompts": OLD_CLASSES}}
    del old["training"]["micro_batch_size"]  # as if it had come since
    assert ours.is_run_of("another hash", old) and ours.differences(old) == []
    assert not ours.is_run_of("another hash", {**old, "seed": 5})
    assert ours.differences({**old, "seed": 5}) == ["seed: 0 here, 5 there"]


def test_an_old_hash_is_no_run_with_a_key_that_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `seed` were such a key: its default is what the old run did."""
    without = identity.as_in_schema_0(recipe().deciding(), recipe().identity())
    del without["seed"]
    monkeypatch.setattr(identity, "SINCE_SCHEMA_0", identity.SINCE_SCHEMA_0 | {"seed"})
    assert recipe().is_run_of(identity.hash_of(without))
    assert not recipe(seed=5).is_run_of(identity.hash_of(without))


def test_what_no_recipe_of_today_says_is_still_named() -> None:
    """Such as a run of a family that isn't installed here."""
    ours = recipe()
    stored = {**ours.identity(), "model": {"family": "nobodys.family", "path": "teacher"}}
    assert not ours.is_run_of("another hash", stored)
    assert ours.differences(stored) == ["model.family: '(absent)' here, 'nobodys.family' there"]


def test_a_record_of_a_newer_version_says_so() -> None:
    stored = {**recipe().identity(), "schema_version": 4}
    assert not recipe().is_run_of("another hash", stored)
    with pytest.raises(RecipeError, match="use the piflow that wrote it, or a newer one"):
        recipe().differences(stored)


def test_a_record_of_this_version_goes_on_and_a_difference_is_named(tmp_path: Path) -> None:
    ours = recipe(run_dir=str(tmp_path), lora={"rank": 8})
    record = RunRecord(ours.hash(), ours.identity(), "sqlite:///x", "run", "manifest")
    run_folder.write_record(str(tmp_path), record)
    assert require_same_recipe(ours) == record
    with pytest.raises(RunDirectoryError, match=r"lora.rank: 256 here, 8 there"):
        require_same_recipe(recipe(run_dir=str(tmp_path)))


def test_a_run_before_a_changed_default_is_its_recipe_with_the_old_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if schema 4 were to come, with another default of `seed` than 7."""
    ours, seeded, stored = recipe(), recipe(seed=7), recipe().identity()
    monkeypatch.setattr(identity, "SCHEMA", 4)
    monkeypatch.setitem(identity.MIGRATIONS, 3, lambda tree: {"seed": 7, **tree})
    assert seeded.is_run_of("another hash", stored)
    assert not ours.is_run_of("another hash", stored)
    assert ours.differences(stored) == ["seed: 0 here, 7 there"]


def test_the_imagenet_classes_moved(tmp_path: Path) -> None:
    embed = {**MINIMAL["embed"], "prompts": OLD_CLASSES}
    assert recipe(schema_version=0, embed=embed).embed.prompts == NEW_CLASSES
    assert recipe(schema_version=0) == recipe(), "nothing else changed"
    assert migrate({"embed": embed}, 0)["embed"]["prompts"] == NEW_CLASSES
    text = (RECIPES / "imagenet-dit-gm-1nfe.yaml").read_text()
    assert NEW_CLASSES in text
    old = tmp_path / "old.yaml"
    text = text.replace(NEW_CLASSES, OLD_CLASSES).replace("schema_version: 3", "schema_version: 0")
    old.write_text(text)
    _, *values = values_of_then("imagenet-dit-gm-1nfe")
    assert load_recipe(old, values).is_run_of(HASHES["imagenet-dit-gm-1nfe"])


@pytest.mark.parametrize("version", [4, -1])
def test_a_version_that_is_not_known_is_refused(version: int) -> None:
    with pytest.raises(RecipeError, match=f"schema_version = {version} isn't known.*reads 0 to 3"):
        recipe(schema_version=version)


@pytest.mark.parametrize("version", ["new", True, 1.0, None])
def test_a_version_that_is_no_number_is_refused(version: Any) -> None:
    with pytest.raises(RecipeError, match="schema_version must be a whole number, got"):
        recipe(schema_version=version)


@pytest.mark.parametrize("name", HASHES)
def test_shipped_recipes_say_their_version(name: str) -> None:
    """So that copies of them mean the same after an upgrade."""
    assert (RECIPES / f"{name}.yaml").read_text().count("\nschema_version: 3") == 1
