"""Retrieval: the closed form is the least squares solution, and clean pictures find themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from piflow.demo import emoji, retrieval

Drawable = tuple[list[emoji.Emoji], Tensor]


def _random_glyphs(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Smooth random premultiplied RGBA, ``(count, 4, 64, 64)``, with soft edges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 4, 8, 8, generator=generator, dtype=dtype)
    rgba = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def _by_brute_force(picture: Tensor, glyph: Tensor) -> float:
    """Every placement, the colour from torch's least squares solver."""
    grid = list(
        itertools.product(retrieval.SHIFTS, retrieval.SHIFTS, retrieval.SCALES, retrieval.DEGREES)
    )
    placement = emoji.Placement(*(glyph.new_tensor(values) for values in zip(*grid, strict=True)))
    rgba = emoji.place(glyph.expand(len(grid), -1, -1, -1), placement, picture.shape[-1])
    residual = ((picture + 1) / 2 - rgba[:, :3]).flatten(2).transpose(1, 2)  # (54, s*s, 3)
    background = (1 - rgba[:, 3]).flatten(1)[..., None]
    colour = torch.linalg.lstsq(background, residual).solution
    return float((residual - background @ colour).square().mean((1, 2)).min())


def test_closed_form_equals_brute_force_in_float64() -> None:
    glyphs = _random_glyphs(3, seed=0)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    distances = retrieval.retrieval_ranks(pictures, glyphs)
    expected = [[_by_brute_force(picture, glyph) for glyph in glyphs] for picture in pictures]
    assert distances.dtype == torch.float64
    torch.testing.assert_close(distances, torch.tensor(expected, dtype=torch.float64))


def test_a_picture_on_the_grid_is_at_distance_zero_whatever_its_background() -> None:
    glyphs = _random_glyphs(2, seed=0)
    placement = emoji.Placement(*(glyphs.new_tensor([v, v]) for v in (0.07, -0.07, 0.88, 6.0)))
    rgba = emoji.place(glyphs, placement)
    for colour in (0.0, 0.3, 1.0):
        pictures = emoji.composite(rgba, torch.full((2, 3), colour, dtype=torch.float64))
        distances = retrieval.retrieval_ranks(pictures, glyphs)
        assert float(distances.diagonal().abs().max()) < 1e-12
        assert float(distances[0, 1]) > 1e-4 and float(distances[1, 0]) > 1e-4


def test_float32_is_close_to_float64() -> None:
    glyphs = _random_glyphs(4, seed=2)
    pictures = torch.rand(
        5, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    exact = retrieval.retrieval_ranks(pictures, glyphs)
    single = retrieval.retrieval_ranks(pictures.float(), glyphs.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-6, rtol=1e-4)


def test_an_opaque_glyph_has_no_background_to_solve_for() -> None:
    glyphs = _random_glyphs(1, seed=3)
    rgba = torch.ones(1, 4, 32 * 32, dtype=torch.float64)
    rgba[:, 3] = 0  # w = 0 everywhere
    picture = torch.full((3, 1, 32 * 32), 0.5, dtype=torch.float64)
    error = retrieval._least_squares_error(picture, rgba.transpose(0, 1))
    assert float(error) == pytest.approx(3 * 32 * 32 * 0.25)
    assert torch.isfinite(retrieval.retrieval_ranks(torch.zeros(1, 3, 32, 32), glyphs)).all()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs = _random_glyphs(5, seed=4)
    pictures = torch.rand(
        7, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    whole = retrieval.retrieval_ranks(pictures, glyphs)
    monkeypatch.setattr(retrieval, "_GLYPHS_AT_ONCE", 2)
    monkeypatch.setattr(retrieval, "_PICTURES_AT_ONCE", 3)
    torch.testing.assert_close(retrieval.retrieval_ranks(pictures, glyphs), whole)


def test_clean_pictures_retrieve_themselves(drawable: Drawable) -> None:
    items, glyphs = drawable
    chosen = glyphs[emoji.most_distinct(items, glyphs, 60, first="red heart")]
    pictures = emoji.random_pictures(chosen, torch.Generator().manual_seed(0))
    assert retrieval.retrieval_at_1(pictures, chosen, torch.arange(60)) >= 0.95


def test_retrieval_at_1_counts_the_right_ones() -> None:
    glyphs = _random_glyphs(4, seed=5, dtype=torch.float32)
    pictures = emoji.random_pictures(glyphs, torch.Generator().manual_seed(0))
    assert retrieval.retrieval_at_1(pictures, glyphs, torch.arange(4)) == 1.0
    assert retrieval.retrieval_at_1(pictures, glyphs, torch.tensor([0, 1, 3, 2])) == 0.5
    assert retrieval.retrieval_at_1(pictures, glyphs, torch.tensor([1, 2, 3, 0])) == 0.0


def test_retrieval_refuses_what_does_not_fit() -> None:
    glyphs, pictures = _random_glyphs(2, seed=0), torch.zeros(3, 3, 16, 16)
    with pytest.raises(ValueError, match=r"one target a picture, \(3,\), got \(2,\)"):
        retrieval.retrieval_at_1(pictures, glyphs, torch.arange(2))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 2\)"):
        retrieval.retrieval_at_1(pictures, glyphs, torch.arange(3))
    with pytest.raises(ValueError, match="square pictures"):
        retrieval.retrieval_ranks(pictures[:, :1], glyphs)
    with pytest.raises(ValueError, match="expected glyphs"):
        retrieval.retrieval_ranks(pictures, glyphs[:, :3])


def test_own_prompts_are_refused_before_there_are_pictures(drawable: Drawable) -> None:
    search = retrieval.EmojiRetrieval({"red heart", "cat face", "no emoji"})
    search.require(["red heart", "cat face"])
    for prompt in ("my own prompt", "no emoji", "dog face"):  # the last doesn't compete
        with pytest.raises(ValueError, match=f"got '{prompt}'; set evaluation.retrieval=false"):
            search.require(["red heart", prompt])
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.raises(ValueError, match="my own"):
        search(pictures, ["red heart", "my own"])
    assert search(pictures, ["red heart", "cat face"]).shape == (2,)
