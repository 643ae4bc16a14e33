"""Gates are parsed strictly, where the recipe is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from piflow.config import Gate, RecipeError, load_recipe, parse_gate, parse_recipe
from piflow.config.metrics import FIGURES
from tests.unit.test_cli import RECIPE


def emoji(**sections: Any) -> dict[str, Any]:
    return yaml.safe_load(RECIPE.read_text()) | sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("psnr_gain_db.low > 0", ("psnr_gain_db", "low", ">", 0.0)),
        ("  diversity_ratio.high<=1.5e0 ", ("diversity_ratio", "high", "<=", 1.5)),
        ("psnr_db >= -3", ("psnr_db", "mean", ">=", -3.0)),
        ("retrieval_at_1.mean < .5", ("retrieval_at_1", "mean", "<", 0.5)),
    ],
)
def test_a_gate_is_metric_bound_comparison_and_number(text: str, expected: Any) -> None:
    assert parse_gate(text) == Gate(text.strip(), *expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr_gain_db", "expected METRIC COMPARISON NUMBER"),
        ("psnr_gain_db > 0 or 1 > 0", "expected METRIC COMPARISON NUMBER"),
        ("__import__('os') > 0", "expected METRIC COMPARISON NUMBER"),
        (
            "psnr_gain.low > 0",
            "unknown metric psnr_gain, .*mean psnr_gain_db",
        ),
        ("fid.low < 1", "unknown metric fid, known: " + ", ".join(FIGURES) + "$"),
        ("psnr_gain_db.lower > 0", r"expected \.low, \.mean, \.high or nothing, got \.lower"),
        ("psnr_gain_db == 0", "expected >, >=, <, <=, got =="),
        ("psnr_gain_db > nan", "expected a finite number, got nan"),
        ("psnr_gain_db > 1e999", "expected a finite number, got 1e999"),
        ("psnr_gain_db > 0dB", "expected a finite number, got 0dB"),
    ],
)
def test_what_is_no_gate_is_refused_with_the_recipe(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"registry.gates: .*{message.removesuffix('$')}"):
        parse_recipe(emoji(registry={"gates": ["psnr_db > 0", text]}))
    with pytest.raises(ValueError, match=message):
        parse_gate(text)


def test_a_gate_of_what_is_not_measured() -> None:
    gates = {"gates": ["retrieval_at_1.low > 0.5"]}
    assert parse_recipe(emoji(registry=gates))
    evaluation = {**emoji()["evaluation"], "retrieval": False}
    with pytest.raises(RecipeError, match="which evaluation.retrieval = false doesn't measure"):
        parse_recipe(emoji(registry=gates, evaluation=evaluation))


def test_gates_are_no_part_of_a_runs_identity() -> None:
    plain = load_recipe(RECIPE)
    other = parse_recipe(emoji(registry={"gates": []}))
    assert plain.registry.parsed() and not other.registry.parsed()
    assert plain.hash() == other.hash()


@pytest.mark.parametrize("comparison", [">", ">=", "<", "<="])
def test_no_gate_holds_for_what_is_no_number(comparison: str) -> None:
    gate = parse_gate(f"psnr_db {comparison} 1")
    assert not gate.holds(math.nan)
    assert gate.holds(1.0) == ("=" in comparison)
    assert gate.holds(2.0) == (">" in comparison) and gate.holds(0.0) == ("<" in comparison)
