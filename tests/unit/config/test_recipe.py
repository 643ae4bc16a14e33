"""Recipes: every mistake is named with its key, what came and what is allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from piflow import config
from piflow.config import (
    BUILT_IN,
    Recipe,
    RecipeError,
    differences,
    find_family,
    load_recipe,
    parse_recipe,
)
from tests.golden.make_recipe_schema import sections

MINIMAL: dict[str, Any] = {
    "name": "test",
    "run_dir": "runs/test",
    "model": {"path": "teacher"},
    "encoder": {"path": "encoder"},
    "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
}


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({**MINIMAL, **sections})


def refusal(**sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    return str(caught.value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


# -------------------------------------------------------------------------------------- mistakes


def test_unknown_keys_are_named_with_what_is_allowed() -> None:
    message = refusal(learning_rate=1e-3)
    assert "unknown key 'learning_rate'" in message and "training" in message
    message = refusal(training={"optimizer": {"learning_rate": 1e-3}})
    assert "unknown key 'training.optimizer.learning_rate'" in message
    assert "lr, betas, weight_decay" in message


def test_unknown_key_of_a_variant_lists_the_variants_keys() -> None:
    message = refusal(objective={"type": "pi_id", "logit_mean": 1.0})
    assert "unknown key 'objective.logit_mean'" in message
    assert "num_intermediate_states" in message and "logit_std" not in message
    message = refusal(objective={"type": "flow_matching", "nfe": 4})
    assert "unknown key 'objective.nfe'" in message and "logit_mean" in message


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"training": {"steps": 0}}, "training.steps: .*greater than 0; got 0"),
        ({"training": {"steps": "many"}}, "training.steps: .*integer.*; got 'many'"),
        ({"model": {"path": "x", "dtype": "fp16"}}, "model.dtype: .*'float32' or 'bfloat16'.*fp16"),
        ({"objective": {"type": "dmd"}}, "objective.type: .*'pi_id', 'flow_matching'; got 'dmd'"),
        ({"objective": {"type": "pi_id", "nfe": 65}}, "objective.nfe: .*64; got 65"),
        ({"guidance": {"interval": [0.5, 1.5]}}, "guidance.interval.1: .*1; got 1.5"),
        ({"name": "My Run"}, "name: .*pattern.*; got 'My Run'"),
        ({"embed": {"prompts": "p", "store": "s", "height": 8}}, "missing key 'embed.width'"),
        ({"lora": {"targets": "proj_out"}}, "lora.targets: .*list; got 'proj_out'"),
    ],
)
def test_wrong_values(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        recipe(**changed)


def test_all_problems_are_told_at_once() -> None:
    message = refusal(seed=-1, training={"steps": 0}, lora={"alpha": 3})
    assert "3 problem(s)" in message
    for key in ("seed", "training.steps", "lora.alpha"):
        assert key in message


def test_a_missing_recipe_names_those_that_are_shipped(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe not found: .*other.yaml.*emoji-flux.yaml"):
        load_recipe(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "expected"), [("name: [", "not valid YAML"), ("- name", "mapping.*found a list")]
)
def test_a_file_that_is_no_mapping(text: str, expected: str, recipe_file: Path) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RecipeError, match=expected) as caught:
        load_recipe(recipe_file)
    assert str(recipe_file) in str(caught.value)


# ------------------------------------------------------------------------------------- overrides


def test_overrides_are_yaml_values(recipe_file: Path) -> None:
    loaded = load_recipe(
        recipe_file,
        [
            "training.optimizer.lr=1e-4",
            "training.steps=7",
            "lora.targets=[proj_mlp, ff.net.2]",
            "tracking.uri=http://host:5000/?a=b",
            "guidance.embedded=null",
            "embed.height=64",
        ],
    )
    assert loaded.training.optimizer.lr == 1e-4
    assert loaded.training.steps == 7
    assert loaded.lora.targets == ["proj_mlp", "ff.net.2"]
    assert loaded.tracking.uri == "http://host:5000/?a=b"
    assert loaded.guidance.embedded is None
    assert (loaded.embed.height, loaded.embed.width) == (64, 32)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", "expects key=value, got 'training.steps'; example"),
        ("=3", "expects key=value"),
        ("training.lr=1", "unknown key 'training.lr'"),
        ("name.x=1", "'name' is a value, not a section"),
        ("training.steps=[1", "training.steps=.*not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, expected: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(recipe_file, [override])


def test_override_into_a_section_that_the_file_leaves_empty(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "training:\n")
    assert load_recipe(recipe_file, ["training.steps=7"]).training.steps == 7


# ---------------------------------------------------------------------------------- cross checks


def test_batch_must_be_whole_micro_batches() -> None:
    message = refusal(training={"batch_size": 10, "micro_batch_size": 4})
    assert "batch_size (10) must be a multiple of micro_batch_size (4)" in message


def test_kept_steps_must_have_checkpoints() -> None:
    message = refusal(training={"checkpoint_every": 100, "keep_every": 250})
    assert "keep_every (250) must be a multiple of checkpoint_every (100)" in message
    kept = recipe(training={"checkpoint_every": 100, "keep_every": 1000})
    assert kept.training.keep_every == 1000 and recipe().training.keep_every is None


@pytest.mark.parametrize("workers", [4, [1, 4]])
def test_every_worker_needs_a_micro_batch(workers: Any) -> None:
    training = {"batch_size": 6, "micro_batch_size": 2}
    message = refusal(training=training, runtime={"num_workers": workers})
    assert "3 micro-batches a step are too few" in message and "at most 3 workers" in message
    assert recipe(training=training, runtime={"num_workers": 2}).runtime.worker_range == (2, 2)


def test_a_range_of_workers() -> None:
    elastic = recipe(runtime={"num_workers": [2, 8]}).runtime
    assert (elastic.worker_range, elastic.max_workers, elastic.is_elastic) == ((2, 8), 8, True)
    assert not recipe(runtime={"num_workers": 3}).runtime.is_elastic
    assert recipe(runtime={"num_workers": [2, 8]}).hash() == recipe().hash()


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "many", [], [0, 2], [3, 2], [1, 2, 3], None])
def test_what_is_no_range_of_workers(workers: Any) -> None:
    message = refusal(runtime={"num_workers": workers})
    assert (
        "runtime.num_workers: expected a positive number of workers, or [fewest, most]" in message
    )


def test_a_range_has_no_groups_of_fixed_size() -> None:
    message = refusal(runtime={"num_workers": [2, 4], "shard_size": 2})
    assert "shard_size (2)" in message and "[2, 4] may become any in between" in message
    assert "strategy = single" in refusal(runtime={"num_workers": [1, 2], "strategy": "single"})


def test_what_runs_on_one_worker_only() -> None:
    muon = {"optimizer": {"type": "muon"}}
    assert "muon needs whole matrices" in refusal(training=muon, runtime={"num_workers": 2})
    single = {"strategy": "single", "num_workers": 2}
    assert "strategy = single runs on one worker" in refusal(runtime=single)
    assert recipe(training=muon, runtime={"strategy": "single"}).runtime.num_workers == 1


DEEPSPEED = {"strategy": "deepspeed", "num_workers": 4}


def test_deepspeed_stages_and_offloading() -> None:
    runtime = recipe(runtime=DEEPSPEED).runtime
    assert runtime.uses_deepspeed and runtime.deepspeed is None
    whole = {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    assert recipe(runtime={**DEEPSPEED, "deepspeed": whole}).runtime.deepspeed.stage == 3
    message = refusal(runtime={**DEEPSPEED, "deepspeed": {"offload_parameters": "cpu"}})
    assert "offload_parameters = cpu is about split weights and stage 2 keeps them whole" in message
    assert "runtime.deepspeed.stage" in refusal(runtime={**DEEPSPEED, "deepspeed": {"stage": 0}})


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "ddp"])
def test_deepspeed_options_are_its_own(strategy: str) -> None:
    message = refusal(runtime={"strategy": strategy, "deepspeed": {"stage": 3}})
    assert f"deepspeed has options, but strategy is {strategy}" in message


@pytest.mark.parametrize("option", [{"shard_size": 2}, {"reshard_after_forward": False}])
def test_deepspeed_has_no_options_of_fsdp(option: dict[str, Any]) -> None:
    message = refusal(runtime={**DEEPSPEED, **option})
    assert "is about FSDP's shards and strategy = deepspeed has none" in message


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_deepspeed_moves_flat_parameters(kind: str) -> None:
    training = {"optimizer": {"type": kind}}
    message = refusal(training=training, runtime=DEEPSPEED)
    assert f"{kind} needs each parameter's shape" in message and "use adamw" in message
    alone = {"strategy": "deepspeed", "num_workers": 1}
    assert not recipe(training=training, runtime=alone).runtime.uses_deepspeed
    offloads = {**alone, "deepspeed": {"offload_optimizer": "cpu"}}
    assert f"{kind} needs each parameter's shape" in refusal(training=training, runtime=offloads)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_muon_takes_replicas_but_no_shards(strategy: str) -> None:
    muon = {"optimizer": {"type": "muon"}}
    sharded = {"strategy": strategy, "num_workers": 2}
    assert f"which strategy = {strategy} may split" in refusal(training=muon, runtime=sharded)
    replicated = {"strategy": "ddp", "num_workers": 2}
    assert recipe(training=muon, runtime=replicated).runtime.strategy == "ddp"


@pytest.mark.parametrize("option", [{"shard_size": 2}, {"reshard_after_forward": False}])
def test_sharding_options_need_shards(option: dict[str, Any]) -> None:
    (name,) = option
    message = refusal(runtime={"strategy": "ddp", "num_workers": 4, **option})
    assert f"{name} is about FSDP's shards and strategy = ddp has none" in message
    for strategy in ("fsdp", "auto"):
        assert recipe(runtime={"strategy": strategy, "num_workers": 4, **option})


def test_shard_size_must_divide_the_workers() -> None:
    message = refusal(runtime={"num_workers": 4, "shard_size": 3})
    assert "shard_size (3) must divide num_workers (4)" in message
    assert recipe(runtime={"num_workers": 4, "shard_size": 2}).runtime.strategy == "auto"


# -------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "changed",
    [
        {"run_dir": "elsewhere"},
        {"runtime": {"num_workers": 2, "max_failures": 0}},
        {"tracking": {"uri": "http://host"}},
        {"evaluation": {"prompts": 3}},
        {"training": {"steps": 9, "checkpoint_every": 2, "keep_last": 9, "log_every": 1}},
        {"training": {"checkpoint_every": 2, "keep_every": 8, "keep_best": 3}},
        {"embed": {**MINIMAL["embed"], "store": "/elsewhere/store", "encoders": [2, 4]}},
    ],
)
def test_identity_ignores_where_how_fast_and_how_long(changed: dict[str, Any]) -> None:
    assert recipe(**changed).hash() == recipe().hash()


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"training": {"optimizer": {"lr": 2e-4}}},
        {"training": {"micro_batch_size": 4}},
        {"embed": {**MINIMAL["embed"], "height": 64}},
        {"objective": {"type": "pi_id", "nfe": 2}},
        {"lora": {"rank": 8}},
    ],
)
def test_identity_holds_what_decides_results(changed: dict[str, Any]) -> None:
    assert recipe(**changed).hash() != recipe().hash()


def test_hash_is_stable_and_independent_of_the_order_of_keys() -> None:
    backwards = parse_recipe(dict(reversed(MINIMAL.items())))
    assert recipe().hash() == backwards.hash() == "c895ca768a7c050f"


def test_differences_name_dotted_keys_and_both_values() -> None:
    ours = recipe(training={"optimizer": {"lr": 2e-4}}, seed=3).deciding()
    found = differences(ours, recipe().deciding())
    assert found == [
        "seed: 3 here, 0 there",
        "training.optimizer.lr: 0.0002 here, 0.0001 there",
    ]
    assert differences({"a": {"b": 1}}, {}) == ["a.b: 1 here, '(absent)' there"]


def test_to_yaml_fills_in_every_default_and_reads_back() -> None:
    whole = recipe(objective={"type": "flow_matching"})
    tree = yaml.safe_load(whole.to_yaml())
    assert tree["objective"]["logit_mean"] == 0.3 and tree["training"]["steps"] == 3000
    assert parse_recipe(tree) == whole


# ----------------------------------------------------------------------------------- the sections


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_documented_and_unknown_ones_are_refused(section: type[BaseModel]) -> None:
    assert section.model_config["extra"] == "forbid" and section.model_config["frozen"] is True
    assert section.__doc__
    inner = {name for name, field in section.model_fields.items() if "Config" in str(field)}
    tags = {name for name in section.model_fields if name == "type"}
    undocumented = {name for name, field in section.model_fields.items() if not field.description}
    assert undocumented <= inner | tags


def test_all_defaults_pass_their_own_checks() -> None:
    """A section without required keys can be left out of a recipe."""
    optional = [s for s in sections() if not any(f.is_required() for f in s.model_fields.values())]
    assert len(optional) >= 9
    for section in optional:
        section()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("mlflow.example:5000", r"expected http\(s\)://host:port"),
        ("htp://mlflow:5000", r"expected http\(s\)://host:port"),
        ("http://", r"expected http\(s\)://host:port"),
        ("https://me:secret@mlflow:5000", "holds a password.*MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_tracking_uri_that_is_none_is_refused(uri: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        recipe(tracking={"uri": uri})


def test_the_length_is_part_of_the_identity_where_the_learning_rate_depends_on_it() -> None:
    constant = {"optimizer": {"decay_fraction": 0.0}}
    decaying = {"optimizer": {"decay_fraction": 0.5}}
    short, long = ({"steps": 10}, {"steps": 20})
    assert (
        recipe(training={**constant, **short}).hash()
        == recipe(training={**constant, **long}).hash()
    )
    assert (
        recipe(training={**decaying, **short}).hash()
        != recipe(training={**decaying, **long}).hash()
    )


def test_pre_training_pictures_are_square() -> None:
    wide = {"prompts": "p.txt", "store": "store", "height": 32, "width": 64}
    assert "draws square pictures, embed is 32x64" in refusal(
        objective={"type": "flow_matching"}, embed=wide
    )


# -------------------------------------------------------------------------------------- variants


def test_a_variant_without_type_is_the_default_one() -> None:
    plain = recipe()
    assert (plain.policy.type, plain.encoder.type, plain.objective.type) == (
        "gmflow", "bert", "pi_id",
    )  # fmt: skip
    assert recipe(policy={"num_gaussians": 3}).policy == config.GMFlowPolicyConfig(num_gaussians=3)


def test_an_unknown_variant_names_the_known_ones() -> None:
    expected = "policy.type: expected one of 'gmflow', 'dx'; got 'gm'"
    assert expected in refusal(policy={"type": "gm"})
    message = refusal(encoder={"type": "t5", "path": "x"})
    assert (
        "encoder.type: expected one of 'flux', 'bert', 'flux2', 'flux2_klein', 'qwen_image', "
        "'qwen_image_edit', 'sd3', 'z_image', 'wan', 'class_label'" in message
    )
    assert "policy: " in refusal(policy=3)


@pytest.mark.parametrize(
    ("sections", "key", "allowed"),
    [
        ({"policy": {"type": "dx", "dropout": 0.1}}, "policy.dropout", "mode, num_points"),
        ({"encoder": {"type": "class_label", "path": "x"}}, "encoder.path", "num_classes"),
        ({"lora": {"alpha": 8}}, "lora.alpha", "rank, dropout, targets"),
        (
            {"training": {"optimizer": {"groups": [{"match": "a"}, {"match": "b", "lr": 1}]}}},
            "training.optimizer.groups.1.lr",
            "match, lr_scale, weight_decay",
        ),
    ],
)
def test_unknown_keys_inside_variants_options_and_lists(
    sections: dict[str, Any], key: str, allowed: str
) -> None:
    message = refusal(**sections)
    assert f"unknown key '{key}'" in message and allowed in message


def test_all_weights_are_trained_without_lora() -> None:
    whole = recipe(lora=None)
    assert whole.lora is None
    assert parse_recipe(yaml.safe_load(whole.to_yaml())) == whole
    assert whole.hash() != recipe().hash()


def test_a_family_goes_with_its_own_encoder_or_with_bert() -> None:
    families = list(BUILT_IN)
    others = {
        "dit": ("class_label",),
        "flux_kontext": ("flux", "bert"),
        "qwen_image_edit": ("qwen_image_edit",),
    }
    names = [name for name in families if name not in ("dit", "flux_kontext")]
    encoders = {name: {"type": name, "path": "x"} for name in (*names, "bert")}
    encoders["class_label"] = {"type": "class_label"}
    for family in families:
        own = others.get(family, (family, "bert"))
        model = {"family": family, "path": "teacher"}
        for name, encoder in encoders.items():
            if name in own:
                column = None if find_family(family).edits is None else "from"
                embed = {**MINIMAL["embed"], "condition_column": column}
                evaluation = {"retrieval": family != "wan"}
                found = recipe(model=model, encoder=encoder, embed=embed, evaluation=evaluation)
                assert found.encoder.type == name
            else:
                expected = f"{family} doesn't go with encoder.type = {name}; it takes {own[0]}"
                assert expected in refusal(model=model, encoder=encoder)


def test_pictures_go_with_the_data_dependent_mode() -> None:
    dependent = {"type": "pi_id", "data": "dependent"}
    assert "dependent goes with a source of pictures" in refusal(objective=dependent)
    assert "free goes with no source" in refusal(objective={"type": "pi_id", "pictures": "emoji"})
    assert recipe(objective={**dependent, "pictures": "emoji"}).objective.pictures == "emoji"
    wide = {"prompts": "p.txt", "store": "store", "height": 32, "width": 64}
    message = refusal(objective={**dependent, "pictures": "emoji"}, embed=wide)
    assert "draws square pictures" in message
    several = {**MINIMAL["embed"], "buckets": [[16, 16], [32, 32]]}
    message = refusal(objective={**dependent, "pictures": "emoji"}, embed=several)
    assert "of one size; leave out embed.buckets" in message


def test_pictures_from_the_store_need_an_image_column() -> None:
    objective = {"type": "pi_id", "data": "dependent", "pictures": "store"}
    with pytest.raises(RecipeError, match="has none without embed.image_column"):
        parse_recipe({**MINIMAL, "objective": objective})
    embed = {**MINIMAL["embed"], "image_column": "image"}
    with_pictures = parse_recipe({**MINIMAL, "objective": objective, "embed": embed})
    with pytest.raises(RecipeError, match="embed.mode = online encodes texts only"):
        parse_recipe({**MINIMAL, "objective": objective, "embed": {**embed, "mode": "online"}})
    plain = parse_recipe(MINIMAL)
    assert "image_column" not in plain.identity()["embed"]
    assert with_pictures.identity()["embed"]["image_column"] == "image"


def test_mirrored_pictures_are_those_of_the_image_column() -> None:
    embed = {**MINIMAL["embed"], "image_column": "image", "flip_probability": 0.5}
    assert parse_recipe({**MINIMAL, "embed": embed}).identity()["embed"]["flip_probability"] == 0.5
    with pytest.raises(RecipeError, match="there is no image_column; leave it out"):
        parse_recipe({**MINIMAL, "embed": {**embed, "image_column": None}})
    with pytest.raises(RecipeError, match="not those of condition_column"):
        parse_recipe({**MINIMAL, "embed": {**embed, "condition_column": "before"}})
    with pytest.raises(RecipeError, match="flip_probability"):
        parse_recipe({**MINIMAL, "embed": {**embed, "flip_probability": 1.5}})


def test_a_tokens_norm_is_of_patches_of_two() -> None:
    guidance = {"scale": 4.0, "keep_norm": True}
    assert recipe(guidance=guidance).identity()["guidance"]["keep_norm"] is True
    odd = replace(find_family("flux"), patch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("piflow.config.recipe.find_family", lambda name: odd)
        message = refusal(guidance=guidance)
    assert "guidance.keep_norm is about tokens of 2x2 patches" in message and "1x1" in message


def test_families_that_edit_need_pictures_and_others_take_none() -> None:
    editing = {
        "model": {"path": "teacher", "family": "flux_kontext"},
        "embed": {**MINIMAL["embed"], "condition_column": "from"},
    }
    with pytest.raises(
        RecipeError, match="flux_kontext edits pictures, and embed.condition_column"
    ):
        recipe(model=editing["model"])
    message = refusal(embed=editing["embed"])
    assert "condition_column = 'from' names pictures" in message
    assert "model.family = flux makes pictures of prompts alone" in message
    assert "use a family that edits (flux_kontext, qwen_image_edit)" in message
    message = refusal(embed={**MINIMAL["embed"], "condition_sizes": [[32, 32]]})
    assert "there is no condition_column" in message
    online = {**editing["embed"], "mode": "online"}
    assert "use embed.mode = store" in refusal(**{**editing, "embed": online})
    for evaluation in (
        {"prompt_set": {"path": "s3://bucket/prompts.json"}, "retrieval": False},
        {"others": [{"name": "another", "base": "s3://bucket/another", "steps": 4}]},
    ):
        assert "is about prompts alone" in refusal(**editing, evaluation=evaluation)
    ours = recipe(**editing)
    assert ours.condition_sizes is not None and len(ours.condition_sizes.sizes) == 17
    assert ours.identity()["embed"]["condition_column"] == "from"
    own = recipe(**{**editing, "embed": {**editing["embed"], "condition_sizes": [[32, 48]]}})
    assert own.condition_sizes is not None and own.condition_sizes.sizes == ((32, 48),)
    assert own.hash() != ours.hash() and recipe().condition_sizes is None
    exact = recipe(**{**editing, "embed": {**editing["embed"], "latent_dtype": "fp32"}})
    assert exact.hash() != ours.hash()
    assert "condition_column" not in recipe().deciding()["embed"]


def test_only_a_distillation_has_a_student() -> None:
    distilling = recipe(objective={"nfe": 3})
    assert distilling.distillation() is distilling.objective
    pretraining = recipe(objective={"type": "flow_matching"})
    with pytest.raises(ValueError, match="got flow_matching.*use `piflow pretrain`"):
        pretraining.distillation()
