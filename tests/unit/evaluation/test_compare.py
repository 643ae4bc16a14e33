"""Evaluation on a tiny model and a real little store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from piflow.backbones import Conditioning, PixelCodec
from piflow.config import Recipe, parse_recipe
from piflow.data.reader import EmbeddingStore
from piflow.data.select import evaluation_rows
from piflow.evaluation import compare
from piflow.evaluation.compare import Method, build_methods, draw, evaluate
from piflow.evaluation.metrics import endpoint_psnr, pairwise_diversity
from piflow.evaluation.sheet import to_uint8
from piflow.inference.gallery import Gallery
from piflow.roles.trio import Trio
from piflow.training.build import build_trio
from piflow.training.step import micro_batch_generator

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


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_draw_pairs_every_seed_with_its_prompt(batch_size: int, tmp_path: Path) -> None:
    """A sampler that returns noise + the prompt's number shows which came with which."""
    noise = torch.randn(3, 2, 12, 4, 2, generator=torch.Generator().manual_seed(0)) / 100
    numbers = torch.tensor([0.1, 0.2, 0.3])
    cond = Conditioning(numbers.view(3, 1, 1), torch.ones(3).long(), numbers.view(3, 1))

    def sample(x: Tensor, prompts: Conditioning) -> Tensor:
        assert prompts.pooled is not None
        assert torch.equal(prompts.tokens[:, 0], prompts.pooled)
        return x + prompts.tokens.view(-1, 1, 1, 1)

    done: list[int] = []
    codec = PixelCodec()
    names = ["a", "b", "c"]
    method, gallery = Method("m", 1, sample), Gallery(str(tmp_path), {})
    drawn = draw(method, names, cond, noise, codec, gallery, batch_size, done.append)
    assert drawn.pictures.shape == (3, 2, 3, 8, 4)
    for prompt in range(3):
        for seed in range(2):
            expected = codec.decode(noise[prompt, seed][None] + numbers[prompt])[0]
            assert (drawn.pictures[prompt, seed] - expected).abs().max() <= 1.001 / 255
            assert torch.equal(to_uint8(drawn.pictures[prompt, seed]), to_uint8(expected))
    assert sum(done) == 6 and max(done) <= batch_size
    assert drawn.seconds > 0 and len(list(tmp_path.glob("*.png"))) == 6
    for row, file in enumerate(drawn.files):
        with Image.open(tmp_path / file) as image:
            assert np.array_equal(np.asarray(image), to_uint8(drawn.pictures[row, 0]).numpy())


def test_draw_clamps_to_the_range_of_pictures(tmp_path: Path) -> None:
    cond = Conditioning(torch.zeros(1, 1, 1), torch.ones(1).long())
    noise = torch.full((1, 2, 12, 2, 2), 3.0)
    gallery = Gallery(str(tmp_path), {})
    method = Method("m", 1, lambda x, _: x)
    drawn = draw(method, ["a"], cond, noise, PixelCodec(), gallery, 2, lambda done: None)
    assert torch.equal(drawn.pictures, torch.ones(1, 2, 3, 4, 4))


def test_one_prompt_twice_has_pictures_of_its_own_noise(tmp_path: Path) -> None:
    cond = Conditioning(torch.zeros(2, 1, 1), torch.ones(2).long())
    noise = torch.stack([torch.zeros(1, 12, 2, 2), torch.ones(1, 12, 2, 2)])
    gallery = Gallery(str(tmp_path), {})
    method = Method("m", 1, lambda x, _: x)
    drawn = draw(method, ["a", "a"], cond, noise, PixelCodec(), gallery, 2, lambda done: None)
    assert drawn.pictures[0].abs().max() < 0.01 and torch.equal(
        drawn.pictures[1], torch.ones(1, 3, 4, 4)
    )


# --------------------------------------------------------------------------------------- methods


def build(ours: Recipe) -> Trio:
    return build_trio(ours).train(False)


def empty() -> Conditioning:
    return Conditioning(torch.zeros(1, 4, 6), torch.tensor([2]), torch.zeros(1, 5))


def test_methods_are_teacher_at_three_step_counts_and_student(
    store: EmbeddingStore, flux_folder: Path
) -> None:
    ours = recipe(store, flux_folder)
    methods = build_methods(ours, build(ours), empty())
    assert [(method.name, method.nfe) for method in methods] == [
        ("teacher, 6 Euler steps", 6),
        ("teacher, 4 Euler steps", 4),
        ("teacher, 2 Euler steps", 2),
        ("student, 2 NFE", 2),
    ]


def test_no_method_is_measured_twice(store: EmbeddingStore, flux_folder: Path) -> None:
    ours = recipe(store, flux_folder, evaluation={"teacher_steps": 4})
    assert [method.nfe for method in build_methods(ours, build(ours), empty())] == [4, 2, 2]


def test_a_recipe_that_distils_nothing(store: EmbeddingStore, flux_folder: Path) -> None:
    ours = recipe(store, flux_folder)
    square = {"prompts": "p.txt", "store": store.uri, "height": 16, "width": 16}
    pretraining = recipe(store, flux_folder, objective={"type": "flow_matching"}, embed=square)
    with pytest.raises(ValueError, match="expected .* pi_id, got flow_matching"):
        build_methods(pretraining, build(ours), empty())


# ------------------------------------------------------------------------------------- the whole


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

    result = evaluate(
        ours, trio, store, CPU, str(tmp_path), "c", retrieve=retrieve, advance=done.append
    )
    assert sum(done) == 4 * 3 * 2
    assert result.prompts == store.first_by_hash(3).prompts
    drawn = list(result.pictures.values())
    reference = drawn[0]
    assert result.methods[0].psnr is None and result.methods[0].diversity_ratio == 1.0
    for method, pictures in zip(result.methods, drawn, strict=True):
        assert pictures.shape == (3, 2, 3, 16, 8) and pictures.abs().max() <= 1
        diversity = pairwise_diversity(pictures).mean().item()
        assert method.diversity == pytest.approx(diversity)
        assert method.retrieval_at_1 == (0.5 if method is result.methods[0] else 0.0)
        if method.psnr is not None:
            assert method.psnr == pytest.approx(endpoint_psnr(pictures, reference))
    student, few = result.methods[-1], result.methods[-2]
    assert student.psnr is not None and few.psnr is not None
    assert result.psnr_gain.value == pytest.approx(student.psnr - few.psnr)
    assert result.diversity_ratio.value == pytest.approx(student.diversity_ratio)
    repeated = [prompt for prompt in result.prompts for _ in range(2)]
    assert asked == [((24, 3, 16, 8), repeated * 4)], "one search, glyphs are placed once"
    assert [row.prompt for row in result.per_prompt] == list(result.prompts)


def test_evaluate_repeats_and_uses_held_out_noise(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path
) -> None:
    ours = recipe(store, flux_folder)
    trio = build(ours)
    first = evaluate(ours, trio, store, CPU, str(tmp_path / "a"), "c")
    again = evaluate(ours, trio, store, CPU, str(tmp_path / "b"), "c")
    assert first.methods[0].retrieval_at_1 is None
    for name, pictures in first.pictures.items():
        assert torch.equal(pictures, again.pictures[name])
    training = {micro_batch_generator(0, step, 0).initial_seed() for step in range(1000)}
    assert micro_batch_generator(0, -1, 0).initial_seed() not in training


def test_what_was_drawn_is_not_drawn_again(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a second call, nor after an interruption; the teacher's not for another checkpoint."""
    ours, folder = recipe(store, flux_folder), str(tmp_path)
    calls: list[int] = []
    real = compare.build_methods

    def counted(*arguments: Any) -> list[Method]:
        def wrapped(method: Method) -> Method:
            def sample(noise: Tensor, cond: Conditioning) -> Tensor:
                calls.append(len(noise))
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return method.sample(noise, cond)

            return Method(method.name, method.nfe, sample)

        return [wrapped(method) for method in real(*arguments)]

    monkeypatch.setattr(compare, "build_methods", counted)
    trio = build(ours)
    with pytest.raises(KeyboardInterrupt):
        evaluate(ours, trio, store, CPU, folder, "c")
    assert calls == [4, 2, 4]
    first = evaluate(ours, trio, store, CPU, folder, "c")
    assert calls[3:] == [4, 2] * 3, "six pictures a method, four at once"
    again = evaluate(ours, trio, store, CPU, folder, "c")
    assert len(calls) == 9
    assert again.methods == first.methods and again.psnr_gain == first.psnr_gain
    damaged = tmp_path / first.files["student, 2 NFE"][1]
    damaged.write_bytes(b"foreign")
    mended = evaluate(ours, trio, store, CPU, folder, "c")
    assert calls[9:] == [1] and mended.psnr_gain == first.psnr_gain
    other = evaluate(ours, trio, store, CPU, folder, "another")
    assert calls[10:] == [4, 2] and other.psnr_gain == first.psnr_gain


def test_batch_size_does_not_change_pictures(
    store: EmbeddingStore, flux_folder: Path, tmp_path: Path
) -> None:
    """Nor which prompts are drawn together: FLUX has no text mask, so padding must be fixed."""
    small = {"prompts": 3, "seeds": 2, "teacher_steps": 6, "batch_size": 1}
    ours, one = recipe(store, flux_folder), recipe(store, flux_folder, evaluation=small)
    trio = build(ours)
    four, single = (
        evaluate(each, trio, store, CPU, str(tmp_path / name), "c").pictures
        for name, each in (("a", ours), ("b", one))
    )
    for name in four:  # a value on the border of two levels may be rounded to either
        torch.testing.assert_close(four[name], single[name], atol=2.001 / 255, rtol=0)
        assert (four[name] != single[name]).float().mean() < 0.01
