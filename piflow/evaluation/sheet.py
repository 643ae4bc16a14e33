"""Pictures for people: labelled sheets, as JPEG.

A picture's file holds its own pixels from 256 a side on; smaller ones are enlarged, unblurred, up
to that. On a sheet it is at most 512 pixels a side, and a sheet is at most 24 megapixels, so that
Pillow, browsers and MLflow take it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from piflow.inference.pixels import enlargement, png_bytes, to_image
from piflow.storage.foreign import shown

_CELL_SIDE = 512  # pixels, of a picture on a sheet
_SHEET_PIXELS = 24_000_000
_JPEG_QUALITY = 92
_PAGE_QUALITY = 88  # of many pictures in a page
_EXACT_SIDE = 256  # pixels, up to which a picture in a page is a PNG
_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_GAP = 4
_FONT_SIZE = 13
_LINE = _FONT_SIZE + 3
_LABEL_LINES = 3
_LABEL_WIDTH = 240  # pixels, of the labels left of the rows

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """A labelled sheet of pictures; `image_grid` of tensors.

    Args:
        rows: each ``(columns, 3, H, W)`` in [-1, 1], all of one shape.
        row_labels, column_labels: as `image_grid`.

    Raises:
        ValueError: as `image_grid`.
    """
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] == 0:
        raise ValueError(
            f"expected rows of pictures (columns, 3, H, W), all of one shape, got {shapes}"
        )
    images = [[to_image(picture) for picture in row] for row in rows]
    return image_grid(images, row_labels, column_labels)


def image_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """A labelled sheet of images: small ones enlarged, large ones made smaller.

    Args:
        rows: of equal length; all images of one size.
        row_labels: one a row, wrapped to its left.
        column_labels: one a column, wrapped above it; cut with an ellipsis where it doesn't fit.

    Raises:
        ValueError: no pictures, pictures of several sizes, or a label missing or left over.
    """
    _check_grid(rows, row_labels, column_labels)
    columns = len(column_labels)
    cell_w, cell_h = _cell(rows[0][0], len(rows) * columns)
    font = ImageFont.load_default(_FONT_SIZE)
    headings = [_wrap(label, font, cell_w) for label in column_labels]
    sides = [_wrap(label, font, _LABEL_WIDTH, max(1, cell_h // _LINE)) for label in row_labels]
    widths = [round(font.getlength(text)) for lines in sides for text in lines]
    left = _GAP + max(widths, default=0) + 2 * _GAP
    top = _GAP + _LINE * max(len(heading) for heading in headings) + _GAP
    sheet = Image.new(
        "RGB",
        (left + columns * (cell_w + _GAP), top + len(rows) * (cell_h + _GAP)),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], x: int, y: int) -> None:
        for number, text in enumerate(lines):
            draw.text((x, y + number * _LINE), text, _INK, font)

    for column, heading in enumerate(headings):
        write(heading, left + column * (cell_w + _GAP), _GAP)
    for row, (pictures, lines) in enumerate(zip(rows, sides, strict=True)):
        y = top + row * (cell_h + _GAP)
        write(lines, _GAP, y + (cell_h - len(lines) * _LINE) // 2)
        for column, picture in enumerate(pictures):
            sheet.paste(_fitted(picture, (cell_w, cell_h)), (left + column * (cell_w + _GAP), y))
    return sheet


def _cell(image: Image.Image, cells: int) -> tuple[int, int]:
    """Width and height on a sheet of so many pictures."""
    factor = float(enlargement(image.height, image.width))
    factor = min(factor, _CELL_SIDE / max(image.size))
    factor = min(factor, (_SHEET_PIXELS / cells / (image.width * image.height)) ** 0.5)
    return max(1, int(image.width * factor)), max(1, int(image.height * factor))


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    whole = size[0] % image.width == 0 and size[1] % image.height == 0
    resampling = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return image.resize(size, resampling, reducing_gap=None if whole else 3.0)


def page_picture(image: Image.Image, pixels: float) -> tuple[str, int, int]:
    """The image as a page holds it: a data URI, its width and height.

    Args:
        pixels: at most so many; small images are kept to the bit, others made smaller.
    """
    side = max(image.size)
    if side <= _EXACT_SIDE:
        return _data_uri("png", png_bytes(image)), image.width, image.height
    factor = min(1.0, (pixels / (image.width * image.height)) ** 0.5)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    resampling = Image.Resampling.LANCZOS
    fitted = image.resize(size, resampling, reducing_gap=3.0) if factor < 1 else image
    buffer = io.BytesIO()
    fitted.save(buffer, format="JPEG", quality=_PAGE_QUALITY)
    return _data_uri("jpeg", buffer.getvalue()), *size


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def jpeg_bytes(image: Image.Image) -> bytes:
    """The image as a JPEG file's bytes; for sheets, which in PNG would be ten times as large."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _wrap(text: str, font: _Font, width: int, most: int = _LABEL_LINES) -> list[str]:
    """Words of ``text`` in at most ``most`` lines that fit ``width`` pixels."""
    lines: list[str] = []
    for word in shown(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    kept = lines[:most]
    if len(lines) > most:
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
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    sizes = sorted({image.size for row in rows for image in row})
    if len(sizes) != 1 or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"expected rows of equal length of pictures of one size, got rows of "
            f"{sorted({len(row) for row in rows})} pictures of sizes (W, H) {sizes}"
        )
    if len(row_labels) != len(rows) or len(column_labels) != len(rows[0]):
        raise ValueError(
            f"{len(rows)} rows of {len(rows[0])} pictures need as many labels, got "
            f"{len(row_labels)} row labels and {len(column_labels)} column labels"
        )
