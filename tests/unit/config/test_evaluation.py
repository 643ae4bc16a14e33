"""What an evaluation may measure, and with whose weights, is decided where the recipe is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from piflow.config import RecipeError, parse_recipe
from piflow.config import evaluation as evaluation_config
from piflow.config.metrics import FIGURES, METRICS
from tests.unit.config.test_registry import emoji

REPOSITORY = Path(__file__).parents[3]
CLIP = {"path": "s3://bucket/clip", "sha256": "ab" * 32, "licence": "MIT"}


def with_evaluation(gates: list[str] | None = None, **keys: Any) -> Any:
    base = emoji()["evaluation"]
    return parse_recipe(emoji(evaluation={**base, **keys}, registry={"gates": gates or []}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["clip_scores"]}, "unknown metric clip_scores, known: .*mean clip_score"),
        ({"metrics": ["fid"]}, "unknown metric fid, known: clip_score, pick_score, hps_v2, dino"),
        ({"metrics": ["psnr"]}, "psnr is measured always; leave it out"),
        ({"metrics": ["retrieval_at_1"]}, "asked for by evaluation.retrieval; leave it out"),
        ({"metrics": ["clip_score"]}, "clip_score needs evaluation.networks.clip: set its path,"),
        ({"metrics": ["fd_dinov2"], "networks": {"dinov2": CLIP}}, "evaluation.references, .*_te"),
        ({"networks": {"clip": {**CLIP, "sha256": "AB"}}}, "networks.clip.sha256: .*match"),
        ({"networks": {"clip": {**CLIP, "path": "ftp://x"}}}, "networks.clip.path"),
        ({"networks": {"clp": CLIP}}, "unknown key 'evaluation.networks.clp'; did you mean 'clip'"),
        ({"networks": {"clip": {"path": "a"}}}, "missing key 'evaluation.networks.clip.sha256'"),
        (
            {"networks": {"clip": {**CLIP, "licence": "CC-BY-NC-4.0"}}},
            "networks.clip.licence is CC-BY-NC-4.0, .*set evaluation.non_commercial = true",
        ),
        (
            {"metrics": ["precision_recall_dinov2_teacher"], "networks": {"dinov2": CLIP},
             "prompts": 1, "seeds": 2, "prompt_list": None},
            "needs at least 4 pictures, and evaluation.prompts × seeds are 2",
        ),
    ],
)  # fmt: skip
def test_what_cant_be_measured_is_refused_with_the_recipe(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        with_evaluation(**keys)


def test_weights_that_may_not_be_sold_need_one_key() -> None:
    networks = {"clip": {**CLIP, "licence": "cc-by-nc-4.0"}}
    recipe = with_evaluation(networks=networks, metrics=["clip_score"], non_commercial=True)
    assert recipe.evaluation.measured == ["psnr", "diversity", "retrieval_at_1", "clip_score"]
    assert recipe.hash() == parse_recipe(emoji()).hash(), "no part of the run's identity"


def test_a_metric_that_may_not_be_sold_needs_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = {"clip": CLIP}
    assert with_evaluation(networks=networks, metrics=["clip_score"])
    other = dataclasses.replace(METRICS["clip_score"], licence="CC-BY-NC-SA-4.0")
    monkeypatch.setitem(evaluation_config.METRICS, "clip_score", other)
    with pytest.raises(RecipeError, match="clip_score is under the licence CC-BY-NC-SA-4.0, "):
        with_evaluation(networks=networks, metrics=["clip_score"])
    assert with_evaluation(networks=networks, metrics=["clip_score"], non_commercial=True)


def test_gates_of_what_is_measured_and_of_what_has_an_interval() -> None:
    networks = {"clip": CLIP, "dinov2": CLIP}
    metrics = ["clip_score", "fd_dinov2_teacher"]
    gates = ["clip_score_to_reference.low > -0.5", "fd_dinov2_teacher < 100"]
    assert with_evaluation(gates, networks=networks, metrics=metrics)
    with pytest.raises(RecipeError, match="fd_dinov2_teacher is one number of all .*write fd_din"):
        with_evaluation(["fd_dinov2_teacher.high < 100"], networks=networks, metrics=metrics)
    with pytest.raises(RecipeError, match="'clip_score > 20', which isn't measured without evalu"):
        with_evaluation(["clip_score > 20"], networks=networks, metrics=metrics[1:])


def test_the_guide_names_every_metric_with_its_licence() -> None:
    guide = (REPOSITORY / "docs" / "metrics.md").read_text()
    rows = [line for line in guide.splitlines() if line.startswith("| `")]
    for name, metric in METRICS.items():
        (row,) = [line for line in rows if f"`{name}`" in line.split("|")[1]]
        assert f"| {metric.licence} |" in row
        assert metric.network is None or f"`networks.{metric.network}`" in row
        assert not metric.references or "`evaluation.references`" in row
    registry = (REPOSITORY / "docs" / "registry.md").read_text()
    for name, figure in FIGURES.items():
        assert f"| `{name}` | {figure.meaning} |" in registry


def test_the_guides_recipes_are_read() -> None:
    guide = (REPOSITORY / "docs" / "metrics.md").read_text()
    measured, prompts, others, gated = (
        yaml.safe_load(part) for part in re.findall(r"```yaml\n(.*?)```", guide, re.S)
    )
    evaluation = measured["evaluation"]
    for network in evaluation["networks"].values():
        network["sha256"] = "ab" * 32
    evaluation["metrics"].append("kd_dinov2_teacher")
    gates = gated["registry"]["gates"]
    assert len(others["evaluation"]["others"]) == 2
    prompts["evaluation"]["prompt_list"] = None
    prompts["evaluation"]["prompt_set"]["sha256"] = "cd" * 32
    assert with_evaluation(gates, **evaluation, **others["evaluation"], **prompts["evaluation"])
