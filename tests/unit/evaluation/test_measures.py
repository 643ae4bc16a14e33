"""Every metric on small random networks, against the library's own result and by hand."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from piflow.config import EvaluationConfig
from piflow.config.metrics import COLUMNS, FIGURES, METRICS
from piflow.evaluation import feature_cache
from piflow.evaluation.intervals import own_figures
from piflow.evaluation.measures import MEASURES, Material, measured
from piflow.evaluation.networks import Instruments, open_instruments
from piflow.inference.pixels import to_image
from tests.unit.evaluation.tiny_networks import save_clip, save_dinov2, save_pictures

pytest.importorskip("torchmetrics")

NAMES = [name for name in METRICS if METRICS[name].network is not None]
PROMPTS = ("a red heart", "a cat", "two dogs")
SEEN: list[int] = []  # pictures by the networks, each once
REFERENCE, FEW, STUDENT = "teacher, 32 Euler steps", "teacher, 4 Euler steps", "student, 4 NFE"


def pictures(seed: int, prompts: int = 3, seeds: int = 3) -> Tensor:
    """A colour each, with noise, as files have them: levels of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 200, (prompts, seeds, 3, 1, 1), generator=generator)
    noise = torch.randint(0, 56, (prompts, seeds, 3, 24, 20), generator=generator)
    return (colours + noise) / 127.5 - 1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    folder = tmp_path_factory.mktemp("metrics")
    settings: dict[str, Any] = {
        "metrics": NAMES,
        "networks": {
            "clip": save_clip(folder / "c"),
            "pick_score": save_clip(folder / "p", 2),
            "hps_v2": save_clip(folder / "h", 3),
            "dinov2": save_dinov2(folder / "d"),
        },
        "references": save_pictures(folder / "world", 7),
    }
    return EvaluationConfig(**settings)


@pytest.fixture(scope="module")
def instruments(config: EvaluationConfig) -> Instruments:
    return open_instruments(config)


@pytest.fixture(scope="module")
def material(instruments: Instruments) -> Material:
    drawn = {name: pictures(seed) for seed, name in enumerate((REFERENCE, FEW, STUDENT))}
    return Material(PROMPTS, drawn, instruments=instruments, advance=SEEN.append)


@pytest.fixture(scope="module")
def columns(material: Material, config: EvaluationConfig) -> dict[str, dict[str, Tensor]]:
    assert config.measured == ["psnr", "diversity", "retrieval_at_1", *NAMES]
    found = measured(config.measured, material)
    assert sum(SEEN) == open_instruments(config).pictures_to_see(3 * 9) == 4 * 27 + 7
    return found


def test_what_is_declared_is_measured(columns: dict[str, dict[str, Tensor]]) -> None:
    assert MEASURES.keys() == METRICS.keys()
    assert columns[STUDENT].keys() == COLUMNS.keys() - {"retrieval"}, "which nobody asked for"
    sets = {name for name, column in COLUMNS.items() if column.kind == "whole"}
    to_itself = {name for name in sets if name.endswith("_teacher")}
    assert columns[REFERENCE].keys() == columns[STUDENT].keys() - to_itself
    for name, values in columns[STUDENT].items():
        assert values.dtype == torch.float64 and torch.isfinite(values).all()
        assert values.shape == (() if COLUMNS[name].kind == "whole" else (3,)), name
    names = {name for metric in METRICS.values() for name in metric.figures}
    assert len(names) == sum(len(metric.figures) for metric in METRICS.values()) == len(FIGURES)


def test_what_decided_a_metric_is_noted(material: Material, columns: Any) -> None:
    noted = material.identities(list(METRICS))
    assert noted["psnr"] == "version 1"
    assert noted["clip_score"].startswith("version 1, clip ")
    expected = "version 1, dinov2 [0-9a-f]{16}, 9 pictures"
    assert re.fullmatch(expected, noted["fd_dinov2_teacher"])
    assert re.fullmatch(f"{expected}, to 7 references [0-9a-f]{{16}}", noted["fd_dinov2"])


def test_scores_of_each_prompt_are_those_by_hand(
    material: Material, columns: dict[str, dict[str, Tensor]]
) -> None:
    images = [[to_image(picture) for picture in some] for some in material.pictures[STUDENT]]
    clip, dinov2 = material.network("clip"), material.network("dinov2")
    for row, prompt in enumerate(PROMPTS):
        (words,) = clip.prompts([prompt])
        cosines = [float(cosine_similarity(clip.pictures([i])[0], words, 0)) for i in images[row]]
        expected = sum(max(0.0, 100 * cosine) for cosine in cosines) / 3
        assert float(columns[STUDENT]["clip_score"][row]) == pytest.approx(expected, abs=1e-3)
        features = [dinov2.pictures([image])[0] for image in images[row]]
        apart = [
            float(1 - cosine_similarity(*two, 0)) for two in itertools.combinations(features, 2)
        ]
        found = float(columns[STUDENT]["dinov2_diversity"][row])
        assert found == pytest.approx(sum(apart) / 3, abs=1e-5)
    assert columns[STUDENT]["clip_score"].max() > 0


@pytest.mark.parametrize(("name", "scale"), [("pick_score", None), ("hps_v2", 100.0)])
def test_preferences_are_the_librarys_own_logits(
    name: Any, scale: float | None, material: Material, columns: dict[str, dict[str, Tensor]]
) -> None:
    """Of CLIPModel itself: scaled as the network says (PickScore), or by 100 (HPSv2)."""
    network: Any = material.network(name)
    for row, prompt in enumerate(PROMPTS):
        images = [to_image(picture) for picture in material.pictures[STUDENT][row]]
        words = network._tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            pixels = torch.stack([network.prepare(image) for image in images])
            logits = network._model(pixel_values=pixels, **words).logits_per_image.mean()
        own = float(network._model.logit_scale.exp())
        expected = float(logits) * (1 if scale is None else scale / own)
        assert float(columns[STUDENT][name][row]) == pytest.approx(expected, rel=1e-4)
        assert own != pytest.approx(100, rel=0.01), "the two would be the same"


def test_the_distance_to_the_teacher_is_of_pairs(
    material: Material, columns: dict[str, dict[str, Tensor]], instruments: Instruments
) -> None:
    """Of the same prompt and noise; a model from other noise has none."""
    dinov2 = material.network("dinov2")
    ours, theirs = (material.pictures[name] for name in (STUDENT, REFERENCE))
    for row in range(3):
        pairs = [
            [dinov2.pictures([to_image(picture)])[0] for picture in pair]
            for pair in zip(ours[row], theirs[row], strict=True)
        ]
        expected = sum(float(1 - cosine_similarity(*pair, 0)) for pair in pairs) / 3
        found = float(columns[STUDENT]["dinov2_distance_teacher"][row])
        assert found == pytest.approx(expected, abs=1e-5) and found > 1e-4
    drawn = {REFERENCE: theirs, "other": ours, FEW: material.pictures[FEW], STUDENT: theirs}
    apart = Material(PROMPTS, drawn, instruments=instruments, other_noise=["other"])
    same = measured(["dinov2_distance_teacher"], apart)
    assert same["other"] == {} and not same[REFERENCE]["dinov2_distance_teacher"].any()
    assert same[STUDENT]["dinov2_distance_teacher"].max() < 1e-6
    figures = own_figures([same[name] for name in drawn])
    nearer = figures["dinov2_distance_teacher_to_few_steps"]
    assert nearer.low <= nearer.value <= nearer.high < 0


class _Pixels(nn.Module):
    """The network as torchmetrics calls one: pictures in, features out."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_features = 8

    def forward(self, drawn: Tensor) -> Tensor:
        return self.network.pictures([to_image(picture) for picture in drawn])


def test_distances_are_the_librarys_own_of_the_same_pictures(
    material: Material, columns: dict[str, dict[str, Tensor]]
) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    network = _Pixels(material.network("dinov2"))
    for metric, column in (
        (FrechetInceptionDistance(feature=network), "fd_dinov2_teacher"),
        (KernelInceptionDistance(feature=network, subset_size=9), "kd_dinov2_teacher"),
    ):
        metric.update(material.reference.flatten(0, 1), real=True)
        metric.update(material.pictures[FEW].flatten(0, 1), real=False)
        computed = metric.compute()
        expected = float(computed[0] if isinstance(computed, tuple) else computed)
        assert float(columns[FEW][column]) == pytest.approx(expected, rel=1e-5)
        assert expected != 0


def test_a_student_that_draws_as_its_reference_is_seen_as_that(instruments: Instruments) -> None:
    """And one that draws one picture a prompt has no diversity; its distances are larger."""
    one = pictures(0)[:, :1].expand(-1, 3, -1, -1, -1)
    drawn = {REFERENCE: pictures(0), FEW: one, STUDENT: pictures(0)}
    found = measured(NAMES, Material(PROMPTS, drawn, instruments=instruments))
    figures = own_figures([found[name] for name in drawn])
    assert figures["fd_dinov2_teacher"].value == pytest.approx(0, abs=1e-5)
    assert figures["kd_dinov2_teacher"].value < found[FEW]["kd_dinov2_teacher"]
    assert found[FEW]["fd_dinov2_teacher"] > 1e-2
    assert figures["precision_dinov2_teacher"].value == figures["recall_dinov2_teacher"].value == 1
    ratio, apart = figures["dinov2_diversity_ratio"], figures["clip_score_to_reference"]
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1, 1, 1))
    assert (apart.low, apart.value, apart.high) == (0, 0, 0)
    assert found[FEW]["dinov2_diversity"].max() < 1e-6
    assert figures["clip_score_gain"].low <= figures["clip_score_gain"].high


def test_other_weights_and_other_references_are_other_figures(
    config: EvaluationConfig, material: Material, tmp_path: Path
) -> None:
    other = EvaluationConfig(
        **{
            **config.model_dump(),
            "networks": {
                **dict(config.networks),
                "clip": save_clip(tmp_path / "c", 1),
            },
            "references": save_pictures(tmp_path / "world", 7, seed=9),
        }
    )
    again = Material(PROMPTS, material.pictures, instruments=open_instruments(other))
    names = ["clip_score", "fd_dinov2", "fd_dinov2_teacher"]
    found, before = measured(names, again), measured(names, material)
    ours, theirs = again.identities(names), material.identities(names)
    for name in names:
        same = torch.equal(found[STUDENT][name], before[STUDENT][name])
        assert same == (ours[name] == theirs[name]) == (name == "fd_dinov2_teacher")


def test_features_of_references_are_computed_once_a_machine(
    config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same to the bit, until a picture or the network changes, or the file is damaged."""
    monkeypatch.setattr(feature_cache, "default_cache", lambda: tmp_path / "cache")
    (tmp_path / "world" / "more").mkdir(parents=True)
    for number in range(4):
        folder = tmp_path / "world" / ("more" if number % 2 else "")
        Image.effect_noise((20, 20), 40 + number).convert("RGB").save(folder / f"{number}.png")
    ours = config.model_copy(update={"references": str(tmp_path / "world")})

    def computed() -> tuple[Tensor, str, bool]:
        opened = open_instruments(ours)
        seen: list[int] = []
        subject = Material(PROMPTS, {}, instruments=opened, advance=seen.append)
        features = subject.features_of_references("dinov2")
        assert sum(seen) == 4 and opened.references is not None
        return features, opened.references.identity, "dinov2" in subject._loaded

    first, identity, loaded = computed()
    again, same, loaded_again = computed()
    assert loaded and not loaded_again
    assert torch.equal(first, again) and identity == same
    (kept,) = (tmp_path / "cache" / "features").iterdir()
    kept.write_bytes(kept.read_bytes()[:-8])
    mended, _, loaded = computed()
    assert loaded and torch.equal(mended, first)
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "world" / "more" / "1.png")
    changed, other, loaded = computed()
    assert loaded and other != identity and not torch.equal(changed, first)
