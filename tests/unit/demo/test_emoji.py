"""The emoji data set: its prompts, and that placing and compositing are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from piflow.demo import emoji

Drawable = tuple[list[emoji.Emoji], Tensor]


def _placement(batch: int = 1, **changes: float) -> emoji.Placement:
    values = {"shift_x": 0.0, "shift_y": 0.0, "scale": 1.0, "degrees": 0.0} | changes
    return emoji.Placement(**{key: torch.full((batch,), value) for key, value in values.items()})


def _smooth_glyph() -> Tensor:
    """A blob off the centre, empty at the border, ``(1, 4, 64, 64)``."""
    axis = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    alpha = torch.exp(-((x - 0.25) ** 2 + (y + 0.125) ** 2) * 30)
    return torch.stack([alpha * 0.9, alpha * 0.5, alpha * 0.1, alpha])[None]


def _centre(rgba: Tensor) -> tuple[float, float]:
    """Centre of alpha in half sides from the middle, (x, y)."""
    alpha = rgba[0, 3]
    axis = (torch.arange(alpha.shape[0]) + 0.5) / alpha.shape[0] * 2 - 1
    return float((alpha.sum(0) * axis).sum() / alpha.sum()), float(
        (alpha.sum(1) * axis).sum() / alpha.sum()
    )


def test_the_list_holds_known_prompts_once_and_in_order() -> None:
    prompts = [item.prompt for item in emoji.list_emoji()]
    assert {"red heart", "grinning face", "pizza", "waving hand", "pirate flag"} <= set(prompts)
    assert prompts == sorted(prompts)
    assert len(set(prompts)) == len(prompts)
    assert len(prompts) > 1600
    assert not [prompt for prompt in prompts if "_" in prompt or ":" in prompt or not prompt]


def test_no_skin_tones_and_no_regional_flags() -> None:
    items = emoji.list_emoji()
    assert not [item.prompt for item in items if "skin tone" in item.prompt]
    prompts = {item.prompt for item in items}
    assert not prompts & {"France", "Germany", "Japan", "Scotland", "England", "Wales"}
    for item in items:
        assert not any("\U0001f3fb" <= char <= "\U0001f3ff" for char in item.glyph)


def test_drawable_emoji_have_glyphs_and_prompts_in_step(drawable: Drawable) -> None:
    items, glyphs = drawable
    assert glyphs.shape == (len(items), 4, emoji.GLYPH_SIZE, emoji.GLYPH_SIZE)
    assert glyphs.dtype == torch.float32
    assert len(items) > 1000
    assert bool((glyphs.flatten(1).amax(1) > 0).all())
    index = next(i for i, item in enumerate(items) if item.prompt == "red heart")
    red, green, blue, alpha = glyphs[index, :, 32, 32]
    assert alpha > 0.99 and red > 0.6 and green < 0.4 and blue < 0.4


def test_glyphs_are_premultiplied(drawable: Drawable) -> None:
    _, glyphs = drawable
    assert 0 <= float(glyphs.min()) and float(glyphs.max()) <= 1 + 1e-5
    assert bool((glyphs[:, :3] <= glyphs[:, 3:] + 1e-5).all())


def test_a_glyph_that_the_font_lacks_is_empty(drawable: Drawable) -> None:
    assert float(emoji.render_glyphs(["\ue000"]).abs().max()) == 0


def test_a_missing_font_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        emoji.render_glyphs(["x"], tmp_path / "absent.ttf")


def test_the_identity_placement_keeps_the_glyph() -> None:
    glyph = torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    placed = emoji.place(glyph, _placement(2), size=32)
    torch.testing.assert_close(placed, torch.nn.functional.avg_pool2d(glyph, 2))


@pytest.mark.parametrize(("shift_x", "shift_y"), [(0.25, 0.0), (0.0, -0.25), (-0.125, 0.125)])
def test_a_shift_moves_the_glyph_right_and_down(shift_x: float, shift_y: float) -> None:
    glyph = _smooth_glyph()
    x, y = _centre(emoji.place(glyph, _placement()))
    moved = emoji.place(glyph, _placement(shift_x=shift_x, shift_y=shift_y))
    assert _centre(moved) == pytest.approx((x + shift_x, y + shift_y), abs=2e-3)


def test_a_shift_by_whole_pixels_is_exact() -> None:
    glyph = _smooth_glyph()
    placed = emoji.place(glyph, _placement())
    moved = emoji.place(glyph, _placement(shift_x=4 / 16))  # 4 of 32 pixels
    torch.testing.assert_close(moved[..., 4:], placed[..., :-4], atol=1e-5, rtol=0)


def test_scale_shrinks_about_the_centre() -> None:
    glyph = _smooth_glyph()
    x, y = _centre(emoji.place(glyph, _placement()))
    small = emoji.place(glyph, _placement(scale=0.5))
    assert _centre(small) == pytest.approx((x / 2, y / 2), abs=2e-3)
    ratio = float(small.sum() / emoji.place(glyph, _placement()).sum())
    assert ratio == pytest.approx(0.25, rel=0.02)


def test_rotation_by_a_quarter_turn() -> None:
    glyph = _smooth_glyph()
    turned = emoji.place(glyph, _placement(degrees=90.0))
    upright = emoji.place(glyph, _placement())
    quarter_turns = [torch.rot90(upright, k, (2, 3)) for k in (1, 3)]
    errors = [float((turned - candidate).abs().max()) for candidate in quarter_turns]
    assert min(errors) < 1e-5 < max(errors)
    four = emoji.place(glyph, _placement(degrees=360.0))
    torch.testing.assert_close(four, upright, atol=1e-4, rtol=0)


def test_shift_is_applied_after_rotation_and_scale() -> None:
    glyph = _smooth_glyph()
    base = emoji.place(glyph, _placement(scale=0.9, degrees=30.0))
    both = emoji.place(glyph, _placement(scale=0.9, degrees=30.0, shift_x=0.25, shift_y=-0.125))
    x, y = _centre(base)
    assert _centre(both) == pytest.approx((x + 0.25, y - 0.125), abs=2e-3)


def test_composite_identities() -> None:
    generator = torch.Generator().manual_seed(0)
    colour = torch.rand(2, 3, generator=generator)
    rgb = torch.rand(2, 3, 8, 8, generator=generator)
    opaque = torch.cat([rgb, torch.ones(2, 1, 8, 8)], 1)
    torch.testing.assert_close(emoji.composite(opaque, colour), rgb * 2 - 1)
    clear = emoji.composite(torch.zeros(2, 4, 8, 8), colour)
    torch.testing.assert_close(clear, (colour * 2 - 1)[:, :, None, None].expand(-1, -1, 8, 8))
    half = emoji.composite(0.5 * opaque, colour)  # premultiplied: half of each
    torch.testing.assert_close(half, (emoji.composite(opaque, colour) + clear) / 2)


def test_random_pictures_are_seeded_and_vary() -> None:
    glyphs = _smooth_glyph().expand(8, -1, -1, -1)
    pictures = emoji.random_pictures(glyphs, torch.Generator().manual_seed(3))
    again = emoji.random_pictures(glyphs, torch.Generator().manual_seed(3))
    other = emoji.random_pictures(glyphs, torch.Generator().manual_seed(4))
    assert pictures.shape == (8, 3, 32, 32)
    assert torch.equal(pictures, again) and not torch.equal(pictures, other)
    assert float(pictures.min()) >= -1 and float(pictures.max()) <= 1 + 1e-5
    assert len({picture.numpy().tobytes() for picture in pictures}) == 8


def test_random_placements_stay_in_their_ranges() -> None:
    placement = emoji.Placement.random(2000, torch.Generator().manual_seed(0))
    for values, low, high in (
        (placement.shift_x, -0.1, 0.1),
        (placement.shift_y, -0.1, 0.1),
        (placement.scale, 0.85, 1.0),
        (placement.degrees, -10.0, 10.0),
    ):
        span = high - low
        assert low <= float(values.min()) < low + 0.01 * span
        assert high - 0.01 * span < float(values.max()) <= high
    pairs = torch.stack([placement.shift_x, placement.shift_y, placement.scale, placement.degrees])
    off_diagonal = torch.corrcoef(pairs) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.1


def test_most_distinct_is_a_farthest_point_order(drawable: Drawable) -> None:
    items, glyphs = drawable
    chosen = emoji.most_distinct(items, glyphs, 30, first="red heart")
    assert items[chosen[0]].prompt == "red heart"
    assert len(set(chosen)) == 30
    assert chosen[:10] == emoji.most_distinct(items, glyphs, 10, first="red heart")
    features = torch.nn.functional.avg_pool2d(glyphs, 8).flatten(1)
    distances = torch.cdist(features, features[chosen])  # (N, 30)
    radii = []
    for count in range(1, 30):
        nearest = distances[:, :count].amin(1)
        assert float(nearest[chosen[count]]) == pytest.approx(float(nearest.max()), rel=1e-4)
        radii.append(float(nearest.max()))
    assert radii == sorted(radii, reverse=True)
