"""Whatever a recipe may say builds what it configures; whatever it may not is a message."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from piflow.config import PiIDConfig, Recipe, RecipeError, flatten, parse_recipe, plain_yaml
from piflow.data.order import _philox
from piflow.ema import ema_beta
from piflow.guidance import guidance_active
from piflow.imitation import ImitationSettings, teacher_ratio
from piflow.schedule import FewStep, FlowSchedule
from piflow.training.optimizers import build_optimizers
from piflow.training.step import learning_rate, micro_batch_generator

MINIMAL: dict[str, Any] = {
    "name": "test",
    "run_dir": "runs/test",
    "model": {"path": "teacher"},
    "encoder": {"path": "encoder"},
    "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
}
WHOLE = {
    **parse_recipe(MINIMAL).model_dump(mode="json"),
    "tracking": {**parse_recipe(MINIMAL).model_dump(mode="json")["tracking"], "uri": "http://host"},
}
KEYS = sorted(flatten(WHOLE))
VARIANTS = [{}, {"policy": {"type": "dx"}}, {"objective": {"type": "flow_matching"}}]

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.floats(0, 2),
    st.sampled_from(
        [math.inf, -math.inf, math.nan, 1e300, 5e-324, -0.0, 2**31, 2**63, 2**64 - 1, 2**64, 10**40]
    ),
)
VALUES = st.one_of(
    NUMBERS,
    st.booleans(),
    st.none(),
    st.lists(NUMBERS, max_size=3),
    st.sampled_from(["", " ", "yes", "1", "s3://bucket/x", "gs://x", "a/b", "${HOME}/x", "a\0b"]),
    st.text(max_size=20),
    st.dictionaries(st.text(max_size=5), NUMBERS, max_size=2),
)


def with_values(variant: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    tree = json.loads(json.dumps({**MINIMAL, **variant}))
    for key, value in values.items():
        *sections, leaf = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return tree


def build(recipe: Recipe) -> None:
    """The small objects that the recipe's numbers go into."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = recipe.training.optimizer.model_copy(update={"type": "adamw"})
    build_optimizers({"weight": weight}, optimizer)
    steps = recipe.training.steps
    for step in {0, 1, steps // 2, steps - 1}:
        assert math.isfinite(learning_rate(step, steps, optimizer))
        ema = recipe.training.ema
        assert 0 <= ema_beta(step, start=ema.start, gamma=ema.gamma, beta=ema.beta) < 1
        micro_batch_generator(recipe.seed, step, 0)
    torch.Generator().manual_seed(recipe.seed)
    for seed in (recipe.seed, recipe.embed.seed):
        _philox(seed, 0, 0)
    guidance_active(torch.rand(3), recipe.guidance.interval)
    build_objective(recipe)
    assert 1 <= recipe.runtime.worker_range[0] <= recipe.runtime.worker_range[1]
    assert recipe.embed.encoders[0] <= recipe.embed.encoders[1]


def build_objective(recipe: Recipe) -> None:
    objective = recipe.objective
    if not isinstance(objective, PiIDConfig):
        FlowSchedule(objective.shift)
        return
    few_step = FewStep.of(objective)
    sigmas = [few_step.schedule.sigma(torch.tensor(item.tau_src)) for item in few_step.segments]
    assert torch.isfinite(torch.stack(sigmas)).all() and len(sigmas) == objective.nfe
    ImitationSettings(
        num_states=objective.num_intermediate_states,
        window_substeps=objective.window_substeps,
        teacher_ratio=teacher_ratio(1, objective.num_decay_iters),
        dropout=recipe.policy.dropout if recipe.policy.type == "gmflow" else 0.0,
        scale=objective.loss_scale,
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@example(variant={}, values={"encoder.type": []})
@given(
    st.sampled_from(VARIANTS),
    st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2),
)
def test_what_parses_builds(variant: dict[str, Any], values: dict[str, Any]) -> None:
    try:
        recipe = parse_recipe(with_values(variant, values))
    except RecipeError as error:
        message = str(error)
        assert len(message) < 20_000 and message.isprintable() or "\n  - " in message
        return
    build(recipe)
    again = parse_recipe(plain_yaml.load_mapping(recipe.to_yaml().encode(), where="it"))
    assert again == recipe and again.hash() == recipe.hash()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf, 10**40])
def test_no_key_takes_a_number_without_bounds(key: str, value: float) -> None:
    for variant in VARIANTS:
        with pytest.raises(RecipeError):
            parse_recipe(with_values(variant, {key: value}))


@pytest.mark.parametrize("key", KEYS)
def test_a_value_is_what_it_is_written_as(key: str) -> None:
    """A truth is no number, a number in quotes is none, and a text is no truth."""
    default = flatten(WHOLE)[key]
    wrong: list[Any] = []
    if isinstance(default, bool):
        wrong = ["yes", "true", 1, 0]
    elif isinstance(default, int | float) and key != "schema_version":
        wrong = [True, str(default)]
    for value in wrong:
        with pytest.raises(RecipeError, match="got"):
            parse_recipe(with_values({}, {key: value}))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"guidance.interval": [0.9, 0.1]}, r"expected \[lowest, highest\] sigma, so \[0.1, 0.9\]"),
        ({"training.optimizer.betas": [0.9, 1.0]}, r"betas.1: .*less than 1; got 1.0"),
        ({"seed": 2**64}, "seed: .*less than 18446744073709551616"),
        ({"embed.seed": 2**64}, "embed.seed"),
        ({"embed.encoders": [4, 1]}, r"at least 4 and at most 1 actors"),
        ({"evaluation.teacher_steps": 4}, "must exceed the student's objective.nfe = 4"),
        ({"tracking.model_name": "a/b"}, "without '/' and ':'"),
        ({"run_dir": "ftp://bucket/x"}, "scheme 'ftp'; supported"),
        ({"run_dir": "$HOME/x"}, "recipes expand none"),
        ({"runtime.use_gpu": "yes"}, "write true or false"),
        ({"training.steps": 10**30}, "training.steps: .*less than or equal to"),
    ],
)
def test_what_surfaced_late(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(with_values({}, changed))


def test_the_extremes_that_are_taken_build() -> None:
    extremes = {
        "seed": 2**64 - 1,
        "embed.seed": 2**64 - 1,
        "objective.shift": 1e-3,
        "objective.final_step_size_scale": 1e-3,
        "training.optimizer.betas": [0, 0.999999],
        "training.steps": 2**31 - 1,
        "training.ema.gamma": 1e12,
    }
    build(parse_recipe(with_values({}, extremes)))
