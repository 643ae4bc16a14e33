"""Figures of each prompt in a file, and what two of them may be compared on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from piflow.config import parse_gate
from piflow.config.metrics import figures_over
from piflow.evaluation.figures import (
    Figures,
    MethodFigures,
    alone,
    not_over,
    over,
    read_figures,
    shared_rows,
)
from piflow.evaluation.gating import judge
from piflow.evaluation.metrics import (
    Interval,
    diversity_ratio_interval,
    psnr_gain_interval,
    psnr_of_error,
)
from piflow.storage.foreign import ForeignDataError

HASH = "0" * 16
KNOWN = ("error", "diversity", "retrieval")


def numbers(seed: int, count: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).double().tolist()


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made(
    seed: int = 0, prompts: int = 6, first: int = 0, better: float = 1.0, **changes: Any
) -> Figures:
    """Figures of prompts `first` and on; the student's error is divided by `better`."""

    def method(number: int, name: str, scale: float = 1.0) -> MethodFigures:
        error = [scale * (0.1 + value) for value in numbers(seed + number, 20)]
        return MethodFigures(
            name=name,
            nfe=4,
            seconds=1.0,
            error=error[first : first + prompts],
            diversity=numbers(seed + number + 50, 20)[first : first + prompts],
            retrieval=[0.5] * prompts,
            files=[f"{row}.png" for row in range(prompts)],
        )

    values: dict[str, Any] = {
        "recipe": "tiny",
        "recipe_hash": HASH,
        "student": "step 2",
        "checkpoint": HASH,
        "reference": {"guidance.scale": "3.5"},
        "seeds": 2,
        "prompts": [f"prompt {first + row}" for row in range(prompts)],
        "noise": [f"{first + row:016x}" for row in range(prompts)],
        "methods": [
            method(1, "teacher, 32 Euler steps", 0.0),
            method(2, "teacher, 4 Euler steps"),
            method(3, "student, 4 NFE", 1 / better),
        ],
    }
    return Figures(**values | changes)


def test_a_file_of_figures_is_read_as_it_was_written() -> None:
    figures = made()
    assert read_figures(figures.model_dump_json().encode(), "it") == figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"prompts": ["a"]}, "expected 1 figures a column, one for each prompt"),
        ({"noise": ["x"]}, "noise.0: String should match"),
        ({"seeds": True}, "seeds: Input should be a valid integer"),
        ({"more": 1}, "more: Extra inputs"),
        ({"methods": []}, "methods: List should have at least 2"),
    ],
)
def test_a_file_of_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    tree = made().model_dump(mode="json") | change
    with pytest.raises(ForeignDataError, match=f"it holds no figures .*{message}.*evaluate again"):
        read_figures(json.dumps(tree).encode(), "it")


def test_methods_with_other_columns_are_refused() -> None:
    tree = made().model_dump(mode="json")
    tree["methods"][1]["retrieval"] = None
    with pytest.raises(ForeignDataError, match="expected the same columns of every method"):
        read_figures(json.dumps(tree).encode(), "it")


def test_figures_that_are_no_numbers_are_refused() -> None:
    tree = made().model_dump(mode="json")
    for wrong in (-1.0, float("nan"), float("inf"), "0.5", None):
        tree["methods"][2]["error"][0] = wrong
        with pytest.raises(ForeignDataError, match=r"methods\.2\.error\.0"):
            read_figures(json.dumps(tree).encode(), "it")


def with_networks(figures: Figures, more: float = 0.0, **metrics: str) -> Figures:
    """With a CLIP score that is `more` higher of the student, and its distance to the teacher."""
    methods = [
        method.model_copy(
            update={
                "columns": {"clip_score": [20.0 + more * last + value for value in method.error]},
                "whole": {"fd_dinov2_teacher": 12.5},
            }
        )
        for last, method in zip((0, 0, 1), figures.methods, strict=True)
    ]
    known = {"clip_score": "version 1, clip abc", "fd_dinov2_teacher": "version 1, dinov2 abc"}
    return figures.model_copy(update={"methods": methods, "metrics": {**known, **metrics}})


def test_figures_of_networks_are_kept_and_compared() -> None:
    first, second = with_networks(made()), with_networks(made(), more=1.5)
    assert read_figures(second.model_dump_json().encode(), "it") == second
    found = alone(second)
    whole = found["fd_dinov2_teacher"]
    assert whole == Interval(12.5, 12.5, 12.5)
    assert found["clip_score"].low < found["clip_score"].value < found["clip_score"].high
    paired = over(second, first)["clip_score_over_champion"]
    assert (paired.low, paired.value, paired.high) == pytest.approx((1.5, 1.5, 1.5))
    absent = not_over(second, first)
    others = ("pick_score", "hps_v2", "dinov2_diversity", "dinov2_distance_teacher")
    assert absent.keys() == {f"{name}_over_champion" for name in others}
    assert "dinov2_diversity wasn't measured of tiny (step 2) and tiny" in str(absent)


def test_figures_by_other_weights_are_not_compared() -> None:
    first, second = with_networks(made()), with_networks(made(), clip_score="version 1, clip def")
    assert over(second, first).keys() == over(made(), made()).keys()
    told = not_over(second, first)["clip_score_over_champion"]
    assert "was measured by version 1, clip def and by version 1, clip abc: evaluate one" in told
    old = made()  # of before networks: what it has is compared
    assert "psnr_over_champion_db" in over(second, old)
    assert (
        "wasn't measured of tiny (step 2): evaluate again with it"
        in (not_over(second, old)["clip_score_over_champion"])
    )


def test_columns_of_a_newer_piflow_are_left_alone() -> None:
    figures = with_networks(made())
    student = figures.student_figures
    columns = {**student.columns, "taste": [1.0] * 6, "fd_dinov2_teacher": [1.0] * 6}
    methods = [*figures.methods[:-1], student.model_copy(update={"columns": columns})]
    newer = figures.model_copy(update={"methods": methods})
    again = read_figures(newer.model_dump_json().encode(), "it")
    assert alone(again) == alone(figures)
    with pytest.raises(ForeignDataError, match="expected 6 figures a column"):
        tree = newer.model_dump(mode="json")
        tree["methods"][2]["columns"]["clip_score"] = [1.0]
        read_figures(json.dumps(tree).encode(), "it")


def test_figures_are_those_of_the_report() -> None:
    figures = made()
    reference, few, student = figures.methods
    found = alone(figures)
    assert found.keys() == figures_over(champion=False, measured=KNOWN).keys()
    error, other = (
        column(student.error),
        column(few.error),
    )
    assert found["psnr_gain_db"] == psnr_gain_interval(error, other)
    assert found["diversity_ratio"] == diversity_ratio_interval(
        column(student.diversity),
        column(reference.diversity),
    )
    whole = found["psnr_db"]
    assert whole.value == pytest.approx(float(psnr_of_error(error.mean())))
    assert whole.low < whole.value < whole.high
    assert found["retrieval_at_1"] == Interval(0.5, 0.5, 0.5)
    unseen = [each.model_copy(update={"retrieval": None}) for each in figures.methods]
    blind = figures.model_copy(update={"methods": unseen})
    assert alone(blind).keys() == found.keys() - {"retrieval_at_1"}


def test_a_student_is_compared_with_another_pair_by_pair() -> None:
    """Prompts vary by 10 dB, the students by exactly 3.0103 dB on each: the interval is a point."""
    first, second = made(), made(better=2.0)
    found = over(second, first)
    assert found.keys() == figures_over(champion=True, measured=KNOWN).keys()
    gain = found["psnr_over_champion_db"]
    assert (gain.low, gain.high) == pytest.approx((gain.value, gain.value))
    assert gain.value == pytest.approx(3.0103, abs=1e-4)
    unpaired = alone(second)["psnr_db"]
    assert unpaired.high - unpaired.low > 1, "which the figures alone would not have shown"


def test_only_prompts_with_the_same_noise_are_compared() -> None:
    first, second = made(prompts=6), made(prompts=6, first=3, better=2.0)
    assert shared_rows([first, second]) == [[3, 4, 5], [0, 1, 2]]
    assert over(second, first)["psnr_over_champion_db"].low == pytest.approx(3.0103, abs=1e-4)
    again = made(noise=[f"{row + 100:016x}" for row in range(6)])
    with pytest.raises(ValueError, match="have 6 prompts in common and none from the same noise"):
        shared_rows([first, again])
    with pytest.raises(ValueError, match="have 0 prompts in common"):
        shared_rows([first, made(prompts=6, first=6)])


def test_a_prompt_that_stands_there_twice_is_two_rows() -> None:
    twice = made(prompts=3).model_copy(update={"prompts": ["same"] * 3})
    assert shared_rows([twice, twice]) == [[0, 1, 2], [0, 1, 2]]


def test_another_reference_is_no_measure() -> None:
    other = made(reference={"guidance.scale": "4.0", "objective.shift": "3.2"})
    with pytest.raises(
        ValueError, match="other references .guidance.scale: 3.5 and 4.0; objective.shift: none and"
    ):
        over(made(), other)


def test_a_gate_that_fails_says_by_how_much() -> None:
    gates = [
        parse_gate(text)
        for text in (
            "psnr_gain_db.low > 0",
            "psnr_gain_db.high < 1",
            "diversity_ratio >= 1",
            "psnr_over_champion_db.low > 0",
        )
    ]
    figures: dict[str, Interval | str] = {
        "psnr_gain_db": Interval(1.0, -0.25, 1.5),
        "diversity_ratio": Interval(1.0, 0.9, 1.1),
    }
    low, high, mean, absent = judge(gates, figures)
    assert not low.holds and low.told.endswith("-0.25 to 1.5): 0.25 too low")
    assert not high.holds and high.told.endswith(": 0.5 too high")
    assert mean.holds and absent.holds and "no champion" in absent.told
    (whole,) = judge([parse_gate("kd_dinov2 < 1")], {"kd_dinov2": Interval(1.5, 1.5, 1.5)})
    assert not whole.holds and whole.told == "1.5: 0.5 too high"
    (unknown,) = judge(gates[:1], {"psnr_gain_db": "it wasn't evaluated"})
    assert not unknown.holds and unknown.told == "can't be judged: it wasn't evaluated"
