"""Retrieval@1 on emoji: does the picture show what its prompt asked for?

A picture counts as right when, of all glyphs, its own prompt's is the nearest. Pictures put their
glyph at an unknown place on an unknown solid colour, so the distance to an emoji is the least mean
squared error over a grid of placements and, for each, over all background colours. The colour is
solved for: with the residual r = y - p of the picture y and the premultiplied glyph p, and with
w = 1 - alpha, what shows of the background, a channel's best colour is c* = <w, r> / <w, w>, and so

    min_c |r - c w|^2 = |r|^2 - <w, r>^2 / <w, w>
    |r|^2 = |y|^2 - 2 <y, p> + |p|^2          <w, r> = <w, y> - <w, p>

which is two matrix products between pictures and placed glyphs for each colour channel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from piflow.demo.emoji import Placement, list_drawable, place
from piflow.storage.foreign import shown

SHIFTS = (-0.07, 0.0, 0.07)  # in half sides of the picture
SCALES = (0.88, 0.96)
DEGREES = (-6.0, 0.0, 6.0)
PLACEMENTS = len(SHIFTS) ** 2 * len(SCALES) * len(DEGREES)
# placed glyphs at a time: 16 emoji x 54 placements x 4 channels x 64 x 64 of drawing are 57 MB
_GLYPHS_AT_ONCE = 16
_PICTURES_AT_ONCE = 2048
_LEAST_BACKGROUND = 1e-6  # <w, w> of a glyph that hides all of its background


class EmojiRetrieval:
    """(pictures, prompts) -> whether each picture shows its prompt's emoji.

    Args:
        among: names of the emoji that compete; None: all that the font can draw.

    Raises:
        FileNotFoundError: the font is not installed.
    """

    def __init__(self, among: Collection[str] | None = None) -> None:
        emoji, glyphs = list_drawable()
        kept = [n for n, item in enumerate(emoji) if among is None or item.prompt in among]
        self._glyphs = glyphs[kept]
        self._position = {emoji[number].prompt: place for place, number in enumerate(kept)}

    def require(self, prompts: Iterable[str]) -> None:
        """Make sure that every prompt is the name of a competing emoji.

        Raises:
            ValueError: names the first that isn't, and what to do.
        """
        unknown = next((prompt for prompt in prompts if prompt not in self._position), None)
        if unknown is not None:
            raise ValueError(
                f"evaluation.retrieval needs emoji names as prompts, got {shown(repr(unknown))}; "
                "set evaluation.retrieval=false for other prompts"
            )

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Hits ``(B,)`` of pictures ``(B, 3, s, s)`` in [-1, 1]; errors as `require`."""
        self.require(prompts)
        targets = torch.tensor([self._position[prompt] for prompt in prompts])
        return retrieval_hits(pictures, self._glyphs, targets)


def retrieval_ranks(pictures: Tensor, glyphs: Tensor) -> Tensor:
    """Distance of every picture to every emoji; sorting a row ranks the emoji, nearest first.

    The glyphs are placed once per call (the slow part for few pictures), so join the pictures of
    several samplers into one call.

    Args:
        pictures: ``(B, 3, s, s)`` in [-1, 1].
        glyphs: ``(N, 4, 64, 64)`` premultiplied RGBA in [0, 1], as `render_glyphs` gives.

    Returns:
        ``(B, N)``: least mean squared error over pixels and channels, with pictures in [0, 1], in
        the pictures' dtype and on their device.

    Raises:
        ValueError: a shape is not as above.
    """
    _check(pictures, glyphs)
    size = pictures.shape[-1]
    channels = ((pictures + 1) / 2).flatten(2).transpose(0, 1).contiguous()  # (3, B, s*s)
    distances = pictures.new_empty(pictures.shape[0], glyphs.shape[0])
    for start in range(0, glyphs.shape[0], _GLYPHS_AT_ONCE):
        some = glyphs[start : start + _GLYPHS_AT_ONCE].to(pictures)
        placed = _placed(some, size)
        for first in range(0, pictures.shape[0], _PICTURES_AT_ONCE):
            rows = slice(first, first + _PICTURES_AT_ONCE)
            error = _least_squares_error(channels[:, rows], placed)
            best = error.unflatten(1, (some.shape[0], PLACEMENTS)).amin(2)
            distances[rows, start : start + some.shape[0]] = best
    return distances / (3 * size * size)


def retrieval_at_1(pictures: Tensor, glyphs: Tensor, targets: Tensor) -> float:
    """Share of `retrieval_hits`; arguments and errors as there."""
    return float(retrieval_hits(pictures, glyphs, targets).double().mean())


def retrieval_hits(pictures: Tensor, glyphs: Tensor, targets: Tensor) -> Tensor:
    """Whether the nearest glyph of ``(N, 4, 64, 64)`` to each picture is its target: (B,) bool.

    Args:
        pictures: ``(B, 3, s, s)`` in [-1, 1].
        targets: ``(B,)`` integer, each picture's own emoji as an index into ``glyphs``.

    Raises:
        ValueError: a shape is not as above, or a target is not an index into ``glyphs``.
    """
    if targets.shape != pictures.shape[:1]:
        raise ValueError(
            f"expected one target a picture, ({pictures.shape[0]},), got {tuple(targets.shape)}"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < glyphs.shape[0]:
        raise ValueError(
            f"targets must be in [0, {glyphs.shape[0]}), the glyphs' indices; got "
            f"{int(targets.min())} to {int(targets.max())}"
        )
    nearest = retrieval_ranks(pictures, glyphs).argmin(1)
    return nearest == targets.to(nearest.device)


def _placed(glyphs: Tensor, size: int) -> Tensor:
    """Glyphs ``(n, 4, 64, 64)`` at every placement: ``(4, n * PLACEMENTS, s*s)``, RGB then w."""
    shifts, scales, degrees = (
        torch.tensor(values, dtype=glyphs.dtype, device=glyphs.device)
        for values in (SHIFTS, SCALES, DEGREES)
    )
    placements = Placement(*torch.cartesian_prod(shifts, shifts, scales, degrees).unbind(1))
    # every glyph is a set of channels of one picture, so that a placement's warp is found once for
    # all of them: six times faster than one picture a glyph
    layers = glyphs.flatten(0, 1).expand(PLACEMENTS, -1, -1, -1)
    rgba = place(layers, placements, size).unflatten(1, (glyphs.shape[0], 4))
    placed = rgba.permute(2, 1, 0, 3, 4).flatten(3).flatten(1, 2)
    return torch.cat([placed[:3], 1 - placed[3:]])


def _least_squares_error(channels: Tensor, placed: Tensor) -> Tensor:
    """Squared errors ``(B, T)`` of pictures ``(3, B, s*s)`` over the best colour on each template.

    Args:
        placed: ``(4, T, s*s)`` premultiplied RGB, then w = 1 - alpha.
    """
    background = placed[3]
    visible = background.square().sum(1).clamp(min=_LEAST_BACKGROUND)  # <w, w>, (T,)
    total = channels.new_zeros(channels.shape[1], placed.shape[1])
    for picture, glyph in zip(channels, placed[:3], strict=True):
        residual_w = picture @ background.T - (background * glyph).sum(1)  # <w, r>, (B, T)
        total += picture.square().sum(1, keepdim=True) + glyph.square().sum(1)
        total.addmm_(picture, glyph.T, alpha=-2)
        total -= residual_w.square_().div_(visible)
    return total.clamp_(min=0)  # rounding only


def _check(pictures: Tensor, glyphs: Tensor) -> None:
    if pictures.dim() != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
        raise ValueError(f"expected square pictures (B, 3, s, s), got {tuple(pictures.shape)}")
    if glyphs.dim() != 4 or glyphs.shape[1] != 4 or glyphs.shape[0] == 0:
        raise ValueError(
            f"expected glyphs (N, 4, height, width) with N >= 1, got {tuple(glyphs.shape)}"
        )
