"""Evaluation on a tiny model and a real little store."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from piflow.backbones import Conditioning
from piflow.config import EvaluationConfig, Recipe, parse_recipe
from piflow.config.metrics import ALWAYS, METRICS
from piflow.data.reader import EmbeddingStore
from piflow.data.select import evaluation_rows
from piflow.evaluation import drawing
from piflow.evaluation.compare import Evaluation, measure
from piflow.evaluation.drawing import Drawing, Method, Plan, Sampler, methods_of
from piflow.evaluation.figures import alone, read_figures
from piflow.evaluation.intervals import own_figures
from piflow.evaluation.measures import Retrieve
from piflow.evaluation.metrics import endpoint_psnr, pairwise_diversity
from piflow.evaluation.networks import Instruments, open_instruments
from piflow.inference.pixels import to_uint8
from piflow.roles.trio import Trio
from piflow.sharding.single import SingleStrategy
from piflow.training.build import build_trio
from piflow.training.export import student_of_checkpoint
from piflow.training.step import micro_batch_generator
from tests.unit.evaluation.tiny_networks import save_clip, save_dinov2, save_pictures
from tests.unit.inference.test_settings import trained

CPU = torch.device("cpu")
NAMES = [f"prompt {number}" for number in range(9)]


@pytest.fixture(scope="module")
def store(make_flux_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    return make_flux_store(NAMES, height=16, width=8)


def recipe(store: EmbeddingStore, flux_folder: Path | str = "unused", **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "unused", "max_tokens": 4},
            "embed": {"prompts": "p.txt", "store": store.uri, "height": 16, "width": 8},
            "objective": {"type": "pi_id", "nfe": 2, "total_substeps": 16},
            "guidance": {"scale": 2.0},
            "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
            "lora": {"rank": 4},
            "evaluation": {"prompts": 3, "seeds": 2, "teacher_steps": 6, "batch_size": 4},
            **sections,
        }
    )


def listed(folder: Path, *names: str) -> dict[str, Any]:
    path = folder / "list.txt"
    path.write_text("\n".join(names))
    return {"prompt_list": str(path), "prompts": 3}


# -------------------------------------------------------------------------------- which prompts


def test_rows_of_a_list_are_its_first_prompts_in_order(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    names = ("prompt 7", "", "  prompt 0 ", "prompt 4", "prompt 5")
    ours = recipe(store, evaluation=listed(tmp_path, *names))
    rows = evaluation_rows(ours, store.index())
    assert rows == [7, 0, 4]
    assert store.read(rows).prompts == ("prompt 7", "prompt 0", "prompt 4")


def test_rows_are_spread_over_the_list(store: EmbeddingStore, tmp_path: Path) -> None:
    ours = recipe(store, evaluation=listed(tmp_path, *NAMES))
    assert evaluation_rows(ours, store.index()) == [0, 3, 6]


def test_rows_without_a_list_are_the_smallest_ids(store: EmbeddingStore) -> None:
    rows = evaluation_rows(recipe(store), store.index())
    assert store.read(rows).prompt_ids == store.first_by_hash(3).prompt_ids


def test_a_list_that_is_too_short(store: EmbeddingStore, tmp_path: Path) -> None:
    ours = recipe(store, evaluation=listed(tmp_path, "prompt 1", "prompt 2"))
    with pytest.raises(ValueError, match="asks for 3 prompts, .*list.txt holds 2; ask for fewer"):
        evaluation_rows(ours, store.index())


def test_a_store_that_is_too_small(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match="asks for 10 prompts, .*store.* holds 9; ask for fewer"):
        evaluation_rows(recipe(store, evaluation={"prompts": 10}), store.index())


def test_a_listed_prompt_that_was_not_embedded(store: EmbeddingStore, tmp_path: Path) -> None:
    ours = recipe(store, evaluation=listed(tmp_path, "prompt 1", "a cat", "a dog"))
    with pytest.raises(ValueError, match="lacks the evaluation prompt 'a cat' and 1 more; embed"):
        evaluation_rows(ours, store.index())


def test_a_list_that_is_missing(store: EmbeddingStore) -> None:
    ours = recipe(store, evaluation={"prompts": 3, "prompt_list": "nowhere.txt"})
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        evaluation_rows(ours, store.index())


# --------------------------------------------------------------------------------------- drawing


def drawing_of(ours: Recipe, store: EmbeddingStore, folder: Path, checkpoint: str = "c") -> Drawing:
    return Drawing(ours, Plan.of(ours, store, str(folder), checkpoint), store)


def with_sampler(monkeypatch: pytest.MonkeyPatch, sample: Sampler) -> None:
    """All methods draw by `sample`, which needs no models."""
    monkeypatch.setattr(drawing, "sampler_of", lambda *_: sample)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_draw_pairs_every_seed_with_its_prompt(
    batch_size: int, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler that returns a number of the prompt's and the noise's shows which came with which.

    The number is the level of a flat picture, up to its rounding to 8 bits.
    """

    def level(noise: Tensor, tokens: Tensor) -> Tensor:
        return (noise.flatten(1).mean(1) * 4 + tokens.flatten(1).mean(1)).tanh() / 2

    def sample(noise: Tensor, cond: Conditioning) -> Tensor:
        return level(noise, cond.tokens).view(-1, 1, 1, 1).expand_as(noise)

    with_sampler(monkeypatch, sample)
    ours = recipe(store, evaluation={"prompts": 3, "seeds": 2, "batch_size": batch_size})
    subject = drawing_of(ours, store, tmp_path)
    done: list[int] = []
    assert subject.draw(Mock(), SingleStrategy(CPU), advance=done.append)
    assert sum(done) == subject.total == 4 * 6 and max(done) <= batch_size
    noise, tokens = subject._noise, subject._cond.tokens
    drawn, pictures_of = subject.read()
    name = next(iter(drawn))
    first, all_pictures = drawn[name], pictures_of[name]
    assert first.seconds > 0 and len(list(tmp_path.glob("*.png"))) == 4 * 6
    levels = [[level(noise[p, s, None], tokens[p, None]) for s in range(2)] for p in range(3)]
    assert torch.tensor(levels).unique().numel() == 6
    for prompt, seed in itertools.product(range(3), range(2)):
        pictures = all_pictures[prompt, seed]
        assert (pictures - levels[prompt][seed]).abs().max() <= 1.001 / 255
    for row, file in enumerate(first.files):
        with Image.open(tmp_path / file) as image:
            assert np.array_equal(np.asarray(image), to_uint8(all_pictures[row, 0]).numpy())


def test_draw_clamps_to_the_range_of_pictures(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_sampler(monkeypatch, lambda noise, _: torch.full_like(noise, 3.0))
    subject = drawing_of(recipe(store), store, tmp_path)
    subject.draw(Mock(), SingleStrategy(CPU))
    first = next(iter(subject.read()[1].values()))
    assert torch.equal(first, torch.ones(3, 2, 3, 16, 8))


def with_networks(folder: Path) -> tuple[EvaluationConfig, Instruments]:
    """Every metric, by small random networks."""
    pytest.importorskip("torchmetrics")
    names = [name for name, metric in METRICS.items() if metric.network is not None]
    values: dict[str, Any] = {
        "metrics": names,
        "networks": {
            "clip": save_clip(folder / "clip"),
            "pick_score": save_clip(folder / "pick_score", 1),
            "hps_v2": save_clip(folder / "hps_v2", 2),
            "dinov2": save_dinov2(folder / "dinov2"),
        },
        "references": save_pictures(folder / "world", 5),
        "retrieval": False,
    }
    config = EvaluationConfig(**values)
    return config, open_instruments(config)


def test_workers_draw_what_one_process_draws(
    store: EmbeddingStore,
    flux_folder: Path,
    flux_inputs: Any,
    tmp_path: Path,
    run_ranks: Callable[..., None],
) -> None:
    """Bit for bit, by shards and by replicas, and stopped in between.

    Five batches for two workers: in the last round one of them has none. With shards neither ever
    has the base whole, which the script sees to.
    """
    odd = {"prompts": 3, "seeds": 3, "teacher_steps": 6, "batch_size": 2}
    ours = recipe(store, flux_folder, evaluation=odd)
    folder, trio = trained(ours, flux_inputs, tmp_path / "checkpoint")
    averaged, _ = student_of_checkpoint(ours, str(folder), "ema")
    expected = evaluate(ours, averaged, store, tmp_path / "alone")
    newest = evaluate(ours, trio, store, tmp_path / "newest")
    assert newest.psnr_gain != expected.psnr_gain, "the average is another student"
    (tmp_path / "recipe.json").write_text(ours.model_dump_json())
    run_ranks(Path(__file__).parent / "drawing_workers.py", tmp_path, timeout=400)
    settings, instruments = with_networks(tmp_path)
    networks = {"metrics": settings.measured, "instruments": instruments}
    by_one = measure(drawing_of(ours, store, tmp_path / "alone"), **networks)
    assert len(by_one.figures) > 12
    for strategy in ("fsdp", "ddp"):
        together = measure(drawing_of(ours, store, tmp_path / strategy), **networks)
        assert together.figures == by_one.figures
        assert together.psnr_gain == expected.psnr_gain
        assert together.per_prompt == expected.per_prompt
        for name, pictures in expected.pictures.items():
            assert torch.equal(together.pictures[name], pictures), name


def test_pictures_that_the_driver_does_not_see(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_sampler(monkeypatch, lambda noise, _: noise)
    subject = drawing_of(recipe(store), store, tmp_path)
    subject.draw(Mock(), SingleStrategy(CPU))
    (tmp_path / "index.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 6 of 6 pictures .* on a shared disk"):
        subject.read()


# --------------------------------------------------------------------------------------- methods


def test_methods_are_teacher_at_three_step_counts_and_student(
    store: EmbeddingStore, flux_folder: Path
) -> None:
    ours = recipe(store, flux_folder)
    assert methods_of(ours) == [
        Method("teacher, 6 Euler steps", 6),
        Method("teacher, 4 Euler steps", 4),
        Method("teacher, 2 Euler steps", 2),
        Method("student, 2 NFE", 2, is_student=True),
    ]


def test_no_method_is_measured_twice(store: EmbeddingStore, flux_folder: Path) -> None:
    ours = recipe(store, flux_folder, evaluation={"teacher_steps": 4})
    assert [method.nfe for method in methods_of(ours)] == [4, 2, 2]


def test_the_curve_has_teacher_and_student_at_every_number(store: EmbeddingStore) -> None:
    """Each once; the first and the last two are where everybody expects them."""
    asked = {"teacher_steps": 6, "nfe": [4, 1, 2, 3]}
    found = methods_of(recipe(store, evaluation=asked))
    teachers = [(6, True), (4, True), (1, False), (3, False)]
    assert [(method.nfe, method.is_headline) for method in found[:4]] == teachers
    assert [(method.nfe, method.is_student) for method in found[4:]] == [
        (1, True),
        (3, True),
        (4, True),
        (2, False),
        (2, True),
    ]
    assert len({method.name for method in found}) == len(found)


@pytest.mark.parametrize(
    ("asked", "policy", "message"),
    [
        ([6], {}, "evaluation.nfe has 6, and evaluation.teacher_steps, the reference, is 6"),
        ([1], {"type": "dx"}, "has 1, and a DX student runs at no fewer .* objective.nfe = 2"),
        ([0], {}, "evaluation.nfe"),
        ([2] * 17, {}, "evaluation.nfe"),
    ],
)
def test_numbers_that_cannot_be_drawn(
    asked: list[int], policy: dict[str, Any], message: str, store: EmbeddingStore
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(
            store,
            policy={"num_gaussians": 3, "logstd_inner_dim": 8} if not policy else policy,
            evaluation={"teacher_steps": 6, "nfe": asked},
        )


def test_a_recipe_that_distils_nothing(store: EmbeddingStore, flux_folder: Path) -> None:
    square = {"prompts": "p.txt", "store": store.uri, "height": 16, "width": 16}
    pretraining = recipe(store, flux_folder, objective={"type": "flow_matching"}, embed=square)
    with pytest.raises(ValueError, match="expected .* pi_id, got flow_matching"):
        methods_of(pretraining)


# ------------------------------------------------------------------------------------- the whole


def build(ours: Recipe) -> Trio:
    return build_trio(ours).train(False)


def evaluate(
    ours: Recipe,
    trio: Trio,
    store: EmbeddingStore,
    folder: Path,
    checkpoint: str = "c",
    *,
    retrieve: Retrieve | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    subject = drawing_of(ours, store, folder, checkpoint)
    assert subject.draw(trio, SingleStrategy(CPU), advance=advance)
    metrics = (*ALWAYS, *(["retrieval_at_1"] if retrieve else []))
    return measure(subject, metrics, retrieve=retrieve)


def test_evaluate_measures_its_own_pictures(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path
) -> None:
    ours = recipe(store, flux_folder)
    trio = build(ours)
    done: list[int] = []
    asked: list[tuple[tuple[int, ...], list[str]]] = []

    def retrieve(pictures: Tensor, prompts: Any) -> Tensor:
        asked.append((tuple(pictures.shape), list(prompts)))
        return torch.arange(len(pictures)) < 3  # three of the first method's six pictures

    result = evaluate(ours, trio, store, tmp_path, retrieve=retrieve, advance=done.append)
    assert sum(done) == 4 * 3 * 2
    assert result.prompts == store.first_by_hash(3).prompts
    drawn = list(result.pictures.values())
    reference = drawn[0]
    assert "error" not in result.methods[0].values and result.methods[0].ratios == {
        "diversity": 1.0
    }
    for method, pictures in zip(result.methods, drawn, strict=True):
        assert pictures.shape == (3, 2, 3, 16, 8) and pictures.abs().max() <= 1
        diversity = pairwise_diversity(pictures).mean().item()
        assert method.values["diversity"] == pytest.approx(diversity)
        assert method.values["retrieval"] == (0.5 if method is result.methods[0] else 0.0)
        if method is not result.methods[0]:
            assert method.values["error"] == pytest.approx(endpoint_psnr(pictures, reference))
    student, few = result.methods[-1], result.methods[-2]
    gain = student.values["error"] - few.values["error"]
    assert result.psnr_gain.value == pytest.approx(gain)
    assert result.diversity_ratio.value == pytest.approx(student.ratios["diversity"])
    repeated = [prompt for prompt in result.prompts for _ in range(2)]
    assert asked == [((24, 3, 16, 8), repeated * 4)], "one search, glyphs are placed once"
    assert [row.prompt for row in result.per_prompt] == list(result.prompts)


def test_a_curve_is_what_students_of_each_number_draw(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path
) -> None:
    """Pictures are those of a recipe with that number, and every comparison is a pair's own."""
    asked = {"prompts": 3, "seeds": 2, "teacher_steps": 6, "batch_size": 4, "nfe": [1, 3]}
    plain = recipe(store, flux_folder)
    ours = recipe(store, flux_folder, evaluation=asked)
    trio = build(ours)
    before = evaluate(plain, trio, store, tmp_path)
    assert [point.nfe for point in before.curve] == [2] and not before.curve[0].over_trained
    files = set(tmp_path.glob("*.png"))
    result = evaluate(ours, trio, store, tmp_path)
    assert len(set(tmp_path.glob("*.png")) - files) == 4 * 6, "two students, two teachers"
    assert result.figures == before.figures
    assert [point.nfe for point in result.curve] == [1, 2, 3]
    reference = result.pictures["teacher, 6 Euler steps"]
    for point in result.curve:
        objective = {"type": "pi_id", "nfe": point.nfe, "total_substeps": 16}
        alone = recipe(store, flux_folder, objective=objective)
        own = evaluate(alone, trio, store, tmp_path / str(point.nfe))
        assert torch.equal(own.pictures[point.student], result.pictures[point.student])
        assert own.figures == point.figures
        own_psnr = endpoint_psnr(result.pictures[point.teacher], reference)
        assert point.teacher_figures["psnr_db"].value == pytest.approx(own_psnr)
        gain = point.figures["psnr_db"].value - own_psnr
        assert point.figures["psnr_gain_db"].value == pytest.approx(gain)
        assert point.seconds and point.teacher_seconds
    trained = result.curve[1]
    assert trained.over_trained == {} and trained.figures == result.figures
    fewer = result.curve[0].over_trained["psnr_over_champion_db"].value
    difference = result.curve[0].figures["psnr_db"].value - trained.figures["psnr_db"].value
    assert fewer == pytest.approx(difference)


def test_prompts_of_a_set_of_their_own_keep_its_order_and_categories(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's rows lie in another order; a category's figures are those of its prompts."""
    monkeypatch.setattr(
        drawing, "sampler_of", lambda method, *_: lambda noise, cond: noise / (1 + method.nfe)
    )
    own = {"prompt_set": {"path": "unused.json"}, "retrieval": False}
    asked = {"prompts": 4, "seeds": 2, "teacher_steps": 6, **own}
    ours = recipe(store, evaluation=asked)
    names = ("prompt 7", "prompt 2", "prompt 8", "prompt 0")
    plan = Plan.of(ours, store, str(tmp_path), "c", prompts=names)
    subject = Drawing(ours, plan, store)
    assert subject.prompts == names
    subject.draw(Mock(), SingleStrategy(CPU))
    result = measure(subject, categories=("a", "b", "a", ""))
    assert result.by_category.keys() == {"a"}, "one prompt has no interval"
    methods = [result.columns[method.name] for method in result.methods]
    alone = [{name: values[[0, 2]] for name, values in columns.items()} for columns in methods]
    assert result.by_category["a"] == own_figures(alone)
    assert measure(subject).by_category == {}


def test_of_many_methods_two_are_in_memory() -> None:
    read: list[str] = []

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: read.append(name) or torch.zeros(1)  # type: ignore[func-returns-value]

    pictures = drawing.Pictures({name: reader(name) for name in "abc"})
    for _ in range(2):
        for name in "abc":
            assert pictures[name] is pictures[name]
            assert len(pictures._kept) <= 2
    assert read == list("abcbc"), "the reference stays"


def test_evaluate_repeats_and_uses_held_out_noise(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path
) -> None:
    ours = recipe(store, flux_folder)
    trio = build(ours)
    first = evaluate(ours, trio, store, tmp_path / "a")
    again = evaluate(ours, trio, store, tmp_path / "b")
    assert "retrieval" not in first.methods[0].values
    for name, pictures in first.pictures.items():
        assert torch.equal(pictures, again.pictures[name])
    training = {micro_batch_generator(0, step, 0).initial_seed() for step in range(1000)}
    assert micro_batch_generator(0, -1, 0).initial_seed() not in training


def test_what_was_drawn_is_not_drawn_again(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a second call, nor after an interruption; the teacher's not for another checkpoint."""
    ours, folder = recipe(store, flux_folder), tmp_path
    calls: list[int] = []
    real = drawing.sampler_of

    def counted(*arguments: Any) -> Sampler:
        sampler = real(*arguments)

        def sample(noise: Tensor, cond: Conditioning) -> Tensor:
            calls.append(len(noise))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return sampler(noise, cond)

        return sample

    monkeypatch.setattr(drawing, "sampler_of", counted)
    trio = build(ours)
    with pytest.raises(KeyboardInterrupt):
        evaluate(ours, trio, store, folder)
    assert calls == [4, 2, 4]
    first = evaluate(ours, trio, store, folder)
    assert calls[3:] == [4, 2] * 3, "six pictures a method, four at once"
    again = evaluate(ours, trio, store, folder)
    assert len(calls) == 9
    assert again.methods == first.methods and again.psnr_gain == first.psnr_gain
    damaged = tmp_path / first.files["student, 2 NFE"][1]
    damaged.write_bytes(b"foreign")
    mended = evaluate(ours, trio, store, folder)
    assert calls[9:] == [1] and mended.psnr_gain == first.psnr_gain
    other = evaluate(ours, trio, store, folder, "another")
    assert calls[10:] == [4, 2] and other.psnr_gain == first.psnr_gain


def test_batch_size_does_not_change_pictures(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path
) -> None:
    """Nor which prompts are drawn together: FLUX has no text mask, so padding must be fixed."""
    small = {"prompts": 3, "seeds": 2, "teacher_steps": 6, "batch_size": 1}
    ours, one = recipe(store, flux_folder), recipe(store, flux_folder, evaluation=small)
    trio = build(ours)
    four, single = (
        evaluate(each, trio, store, tmp_path / name).pictures
        for name, each in (("a", ours), ("b", one))
    )
    for name in four:  # a value on the border of two levels may be rounded to either
        torch.testing.assert_close(four[name], single[name], atol=2.001 / 255, rtol=0)
        assert (four[name] != single[name]).float().mean() < 0.01


# ------------------------------------------------------------------------------------- an adapter


def test_an_adapter_is_measured_as_its_checkpoint(
    store: EmbeddingStore,
    flux_folder: Path,
    flux_inputs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its two files alone, and by the schedule in its name where it notes none."""
    from safetensors.torch import load_file, save_file

    from piflow.commands import evaluate
    from piflow.roles.adapter import CONFIG_FILE, WEIGHTS_FILE
    from piflow.training import preflight
    from piflow.training.export import export_adapter

    encoder = store.manifest.encoder  # which is made up
    opened = SimpleNamespace(store=store, retrieval=None, base_sha256="ab" * 32, encoder=encoder)
    monkeypatch.setattr(preflight, "preflight", lambda recipe, evaluation: opened)
    ours = recipe(store, flux_folder, run_dir=str(tmp_path / "run"))
    checkpoint, _ = trained(ours, flux_inputs, tmp_path / "checkpoint")
    asked, _ = with_networks(tmp_path)
    wanted = {key: getattr(asked, key) for key in ("metrics", "networks", "references")}
    evaluation = ours.evaluation.model_copy(update={**wanted, "retrieval": False})
    ours = ours.model_copy(update={"evaluation": evaluation})
    folder = tmp_path / "adapter"
    export_adapter(ours, str(checkpoint), str(folder), weights="ema", dtype="float32", lineage={})
    found = evaluate.of_adapter(ours, str(folder), show_progress=False)
    trio, _ = student_of_checkpoint(ours, str(checkpoint), "ema")
    drawing_ = Drawing(ours, Plan.of(ours, store, str(tmp_path / "p"), "x"), store)
    drawing_.draw(trio, SingleStrategy(CPU))
    expected = measure(drawing_)
    assert found.methods[-1].name == "student, 2 NFE"
    for name, pictures in expected.pictures.items():
        assert torch.equal(found.pictures[name], pictures), name
    plain = tmp_path / "gm_4step"
    plain.mkdir()
    (plain / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    save_file(load_file(folder / WEIGHTS_FILE), plain / WEIGHTS_FILE)
    other = evaluate.of_adapter(ours, str(tmp_path), subfolder="gm_4step", show_progress=False)
    assert [method.nfe for method in other.methods] == [6, 8, 4, 4]
    (report,) = (tmp_path / "run").glob("evaluation-gm_4step-*/report.html")
    assert "gm_4step" in report.read_text()
    kept = report.parent / "figures" / "adapter.json"
    figures = read_figures(kept.read_bytes(), "it")
    assert alone(figures) == other.figures, "as JSON keeps them, to the last bit"
    assert figures.metrics.keys() == set(asked.measured)
    page = report.read_text()
    summary = evaluate.summary(other)
    for name in ("clip_score_to_reference", "fd_dinov2", "recall_dinov2_teacher"):
        assert f">{name}<" in page and summary[f"eval/{name}"] == other.figures[name].value
    assert summary["eval/student_4_nfe/clip_score"] == other.methods[-1].values["clip_score"]
    assert figures.metrics["clip_score"] in page and "torchmetrics 1" in page
    assert (figures.prompts, figures.noise) == (list(other.prompts), list(other.noise))
    assert figures.student == str(plain) and figures.reference["model.path"].startswith("weights")
    qwen = ours.model_copy(update={"model": ours.model.model_copy(update={"family": "qwen_image"})})
    with pytest.raises(ValueError, match="a student of the family flux, the recipe's teacher is"):
        evaluate.of_adapter(qwen, str(folder), show_progress=False)
    guided = ours.model_copy(
        update={"guidance": ours.guidance.model_copy(update={"embedded": 2.0})}
    )
    config = json.loads((plain / CONFIG_FILE).read_text())
    (plain / CONFIG_FILE).write_text(json.dumps(config | {"guidance_embeds": True}))
    with pytest.raises(ValueError, match="trained with embedded guidance 3.5, the recipe's is 2"):
        evaluate.of_adapter(guided, str(plain), show_progress=False)
