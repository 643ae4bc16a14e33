"""Emoji as a real, small text-to-image data set.

Prompts are the English names of the Unicode/CLDR data that the package ``emoji`` carries; pictures
are the glyphs of Debian's ``fonts-noto-color-emoji`` (SIL Open Font Licence). Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GLYPH_SIZE = 64  # pixels a side of the stored glyphs, twice the picture's size, for antialiasing
_FONT_SIZE = 109  # the only bitmap size in the font
_FONT_CANVAS = (136, 128)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its English name, used as the prompt, and its code points."""

    prompt: str
    glyph: str


def list_emoji() -> list[Emoji]:
    """All fully qualified emoji without skin tones and flags of regions, ordered by prompt.

    Names become prompts by replacing underscores with blanks ("red_heart" -> "red heart").
    """
    import emoji as emoji_data

    found = []
    for glyph, entry in emoji_data.EMOJI_DATA.items():
        if entry["status"] != emoji_data.STATUS["fully_qualified"]:
            continue
        if any(_is_skin_tone(char) or _is_flag_letter(char) for char in glyph):
            continue
        found.append(Emoji(entry["en"].strip(":").replace("_", " "), glyph))
    return sorted(found, key=lambda item: item.prompt)


def _is_skin_tone(char: str) -> bool:
    return 0x1F3FB <= ord(char) <= 0x1F3FF


def _is_flag_letter(char: str) -> bool:
    """Regional indicators (country flags) and tag characters (flags of their parts)."""
    return 0x1F1E6 <= ord(char) <= 0x1F1FF or 0xE0020 <= ord(char) <= 0xE007F


def render_glyphs(glyphs: list[str], font: Path = DEFAULT_FONT) -> Tensor:
    """Draw each glyph once.

    Returns:
        ``(N, 4, 64, 64)`` float32 in [0, 1]: RGB premultiplied by alpha, then alpha. A glyph that
        the font lacks is all zeros.

    Raises:
        FileNotFoundError: the font is not installed.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not font.exists():
        raise FileNotFoundError(
            f"emoji font not found at {font}; install it with "
            "`apt-get install fonts-noto-color-emoji`"
        )
    face = ImageFont.truetype(str(font), _FONT_SIZE)
    size = (GLYPH_SIZE, GLYPH_SIZE)
    pictures = np.zeros((len(glyphs), 4, GLYPH_SIZE, GLYPH_SIZE), dtype=np.float32)
    for index, glyph in enumerate(glyphs):
        canvas = Image.new("RGBA", _FONT_CANVAS, (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((0, 0), glyph, font=face, embedded_color=True)
        square = Image.new("RGBA", (_FONT_CANVAS[0], _FONT_CANVAS[0]), (0, 0, 0, 0))
        square.paste(canvas, (0, (_FONT_CANVAS[0] - _FONT_CANVAS[1]) // 2))
        rgba = np.asarray(square, dtype=np.float32) / 255
        rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
        planes = [
            Image.fromarray(rgba[..., c], mode="F").resize(size, Image.Resampling.BOX)
            for c in range(4)
        ]
        pictures[index] = np.stack([np.asarray(plane) for plane in planes])
    return torch.from_numpy(pictures)


def list_drawable(font: Path = DEFAULT_FONT) -> tuple[list[Emoji], Tensor]:
    """The emoji that the font can draw, with their glyphs ``(N, 4, 64, 64)``."""
    emoji = list_emoji()
    glyphs = render_glyphs([item.glyph for item in emoji], font)
    keep = glyphs.flatten(1).amax(1) > 0
    return [item for item, kept in zip(emoji, keep.tolist(), strict=True) if kept], glyphs[keep]


def most_distinct(emoji: list[Emoji], glyphs: Tensor, count: int, first: str) -> list[int]:
    """Indices of the ``count`` visually most distinct emoji: farthest-point order from ``first``.

    Each next emoji is the one whose picture (8x8 premultiplied RGBA, Euclidean distance) is
    farthest from all chosen so far. Near-identical pictures would make retrieval@1 ambiguous;
    this rule leaves them out without looking at any model.
    """
    features = F.avg_pool2d(glyphs, GLYPH_SIZE // 8).flatten(1)
    chosen = [next(i for i, item in enumerate(emoji) if item.prompt == first)]
    nearest = (features - features[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        index = int(nearest.argmax())
        chosen.append(index)
        nearest = torch.minimum(nearest, (features - features[index]).norm(dim=1))
    return chosen


@dataclass(frozen=True)
class Placement:
    """How glyphs are put on pictures. All ``(B,)``; shifts in half sides of the picture."""

    shift_x: Tensor
    shift_y: Tensor
    scale: Tensor
    degrees: Tensor

    @staticmethod
    def random(batch: int, generator: torch.Generator) -> Placement:
        """Shift up to 1.6 of 32 pixels each way, scale 0.85 to 1, rotation up to 10 degrees."""
        u = torch.rand(4, batch, generator=generator)
        return Placement(
            shift_x=(u[0] - 0.5) * 0.2,
            shift_y=(u[1] - 0.5) * 0.2,
            scale=0.85 + 0.15 * u[2],
            degrees=(u[3] - 0.5) * 20,
        )


def place(glyphs: Tensor, placement: Placement, size: int = 32) -> Tensor:
    """Shift, scale and rotate glyphs ``(B, 4, 64, 64)`` to premultiplied RGBA ``(B, 4, s, s)``."""
    angle = torch.deg2rad(placement.degrees)
    cos, sin = torch.cos(angle) / placement.scale, torch.sin(angle) / placement.scale
    # output -> input map: undo the shift, then rotate and scale back
    shift_x = -(cos * placement.shift_x + sin * placement.shift_y)
    shift_y = -(-sin * placement.shift_x + cos * placement.shift_y)
    theta = torch.stack(
        [torch.stack([cos, sin, shift_x], -1), torch.stack([-sin, cos, shift_y], -1)], -2
    )
    fine = 2 * size  # draw at twice the size, then average: antialiasing
    grid = F.affine_grid(theta, [glyphs.shape[0], 4, fine, fine], align_corners=False)
    drawn = F.grid_sample(glyphs, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(drawn, 2)


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """Premultiplied RGBA ``(B, 4, s, s)`` over colours ``(B, 3)`` in [0, 1] -> RGB in [-1, 1]."""
    rgb = rgba[:, :3] + (1 - rgba[:, 3:]) * background[:, :, None, None]
    return rgb * 2 - 1


def random_pictures(glyphs: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """Pictures ``(B, 3, s, s)`` in [-1, 1]: glyphs at random placements on random solid colours."""
    rgba = place(glyphs, Placement.random(glyphs.shape[0], generator), size)
    return composite(rgba, torch.rand(glyphs.shape[0], 3, generator=generator))


class PictureSource:
    """(prompts, generator) -> random pictures of these emoji."""

    def __init__(self, size: int = 32, font: Path = DEFAULT_FONT) -> None:
        emoji, self._glyphs = list_drawable(font)
        self._size = size
        self._index = {item.prompt: number for number, item in enumerate(emoji)}

    def require(self, prompts: Iterable[str]) -> None:
        """Make sure that there is a picture of every prompt.

        Raises:
            ValueError: a prompt that is not the name of an emoji that the font can draw.
        """
        unknown = [prompt for prompt in prompts if prompt not in self._index]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not the name of an emoji that the font can draw; pictures of "
                "emoji go with the prompts of package://piflow.demo/prompts.txt"
            )

    def __call__(self, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
        """Pictures ``(B, 3, size, size)`` in [-1, 1]; errors as `require`."""
        self.require(prompts)
        rows = [self._index[prompt] for prompt in prompts]
        return random_pictures(self._glyphs[rows], generator, self._size)
