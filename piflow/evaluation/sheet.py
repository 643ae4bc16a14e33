"""Pictures for people: tensors to pixels, labelled grids, PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

UPSCALE = 3  # demo pictures are 32 pixels a side: three screen pixels each, unblurred
_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_GAP = 4
_FONT_SIZE = 13
_LABEL_LINES = 3

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_uint8(pictures: Tensor) -> Tensor:
    """``(..., 3, H, W)`` in [-1, 1] (values outside are clipped) -> ``(..., H, W, 3)`` uint8, CPU.

    Raises:
        ValueError: not three channels, or a value is not finite.
    """
    if pictures.dim() < 3 or pictures.shape[-3] != 3:
        raise ValueError(f"expected RGB pictures (..., 3, H, W), got {tuple(pictures.shape)}")
    if not bool(torch.isfinite(pictures).all()):
        raise ValueError("pictures hold NaN or infinite values; the sampler diverged")
    scaled = (pictures.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(-3, -1).cpu()


def to_image(picture: Tensor, upscale: int = 1) -> Image.Image:
    """One picture ``(3, H, W)`` in [-1, 1] as an RGB image, enlarged without smoothing."""
    image = Image.fromarray(to_uint8(picture).numpy())
    return image.resize((image.width * upscale, image.height * upscale), Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """A labelled sheet of pictures, enlarged `UPSCALE` times without smoothing.

    Args:
        rows: each ``(columns, 3, H, W)`` in [-1, 1], all of one shape.
        row_labels: one a row, written to its left.
        column_labels: one a column, wrapped above it; cut with an ellipsis where it doesn't fit.

    Raises:
        ValueError: no pictures, rows of several shapes, or a label missing or left over.
    """
    _check_grid(rows, row_labels, column_labels)
    columns, _, height, width = rows[0].shape
    cell_w, cell_h = width * UPSCALE, height * UPSCALE
    font = ImageFont.load_default(_FONT_SIZE)
    headings = [_wrap(label, font, cell_w) for label in column_labels]
    line = _FONT_SIZE + 3
    left = _GAP + max(round(font.getlength(label)) for label in row_labels) + 2 * _GAP
    top = _GAP + line * max(len(heading) for heading in headings) + _GAP
    sheet = Image.new(
        "RGB",
        (left + columns * (cell_w + _GAP), top + len(rows) * (cell_h + _GAP)),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        for index, text in enumerate(heading):
            draw.text((left + column * (cell_w + _GAP), _GAP + index * line), text, _INK, font)
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + row * (cell_h + _GAP)
        draw.text((_GAP, y + (cell_h - line) // 2), label, _INK, font)
        for column, picture in enumerate(pictures):
            sheet.paste(to_image(picture, UPSCALE), (left + column * (cell_w + _GAP), y))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _wrap(text: str, font: _Font, width: int) -> list[str]:
    """Words of ``text`` in at most `_LABEL_LINES` lines that fit ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    kept = lines[:_LABEL_LINES]
    if len(lines) > _LABEL_LINES:
        kept[-1] += "…"
    return [_cut(item, font, width) for item in kept]


def _cut(text: str, font: _Font, width: int) -> str:
    """``text``, or as much of it as fits ``width`` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    kept = text.rstrip("…")
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1]
    return kept + "…"


def _check_grid(
    rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] == 0:
        raise ValueError(
            f"expected rows of pictures (columns, 3, H, W), all of one shape, got {shapes}"
        )
    if len(row_labels) != len(rows) or len(column_labels) != shapes[0][0]:
        raise ValueError(
            f"{len(rows)} rows of {shapes[0][0]} pictures need as many labels, got "
            f"{len(row_labels)} row labels and {len(column_labels)} column labels"
        )
