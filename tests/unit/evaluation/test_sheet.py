"""Pictures keep their pixels, and grids put each where its labels say."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from piflow.evaluation import sheet
from piflow.inference import pixels


def _solid(*colours: tuple[float, float, float], size: int = 32) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, size, size)


def test_to_uint8_inverts_the_scaling_of_every_level() -> None:
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    restored = pixels.to_uint8(levels / 127.5 - 1)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, levels.to(torch.uint8).movedim(1, -1))


def test_to_uint8_clips_and_keeps_leading_dimensions() -> None:
    values = torch.tensor([-9.0, 9.0]).reshape(2, 1, 1, 1, 1).expand(2, 1, 3, 4, 5)
    converted = pixels.to_uint8(values)
    assert converted.shape == (2, 1, 4, 5, 3)
    assert converted[0].eq(0).all() and converted[1].eq(255).all()


def test_to_uint8_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match="expected RGB pictures"):
        pixels.to_uint8(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="diverged"):
        pixels.to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = pixels.to_image(picture)
    assert np.array_equal(np.asarray(image), pixels.to_uint8(picture).numpy())
    expected = pixels.to_uint8(picture).numpy().repeat(4, 0).repeat(4, 1)
    assert np.array_equal(np.asarray(pixels.enlarged(image)), expected)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(8, 8, 4), (64, 64, 4), (65, 40, 3), (128, 128, 2), (129, 64, 1), (256, 256, 1), (64, 300, 1)],
)
def test_nothing_is_enlarged_beyond_256_pixels(height: int, width: int, factor: int) -> None:
    assert pixels.enlargement(height, width) == factor
    enlarged = pixels.enlarged(Image.new("RGB", (width, height)))
    assert enlarged.size == (width * factor, height * factor)


def test_a_sheet_of_large_pictures_stays_small() -> None:
    """8 x 4 pictures of 1024 pixels a side, as an evaluation has them: Pillow reads it again."""
    noise = torch.randn(4, 3, 1024, 1024, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    drawn = sheet.grid([noise] * 8, [f"prompt {n}" for n in range(8)], ["a", "b", "c", "d"])
    assert drawn.width * drawn.height < 12e6
    content = sheet.jpeg_bytes(drawn)
    assert len(content) < 16 * 2**20
    with Image.open(io.BytesIO(content)) as again:
        assert again.size == drawn.size and again.format == "JPEG"


def test_a_sheet_of_many_pictures_stays_small() -> None:
    image = Image.new("RGB", (256, 256))
    drawn = sheet.image_grid([[image] * 8] * 64, ["x"] * 64, ["y"] * 8)
    assert drawn.width * drawn.height < 64 * 8 * 256 * 256
    assert drawn.width * drawn.height < Image.MAX_IMAGE_PIXELS / 2
    assert max(drawn.size) < 65_000, "JPEG's limit"


def test_long_and_strange_labels_take_no_room() -> None:
    label = "\x1b[31m\u202e" + "word " * 2000
    drawn = sheet.image_grid([[Image.new("RGB", (64, 64))]], [label], [label])
    assert drawn.width < 600 and drawn.height < 400


def test_grid_holds_every_picture_in_its_row_and_column() -> None:
    first = _solid((1, -1, -1), (-1, 1, -1), (-1, -1, 1))
    second = _solid((1, 1, -1), (-1, 1, 1), (1, -1, 1))
    drawn = np.asarray(sheet.grid([first, second], ["teacher", "student"], ["a", "b", "c"]))
    centres = []
    for colour in torch.cat([first, second])[:, :, 0, 0]:
        rgb = pixels.to_uint8(colour[:, None, None]).flatten().numpy()
        ys, xs = np.nonzero((drawn == rgb).all(-1))
        assert len(ys) == (32 * 4) ** 2
        centres.append((ys.mean(), xs.mean()))
    rows = [centre[0] for centre in centres]
    columns = [centre[1] for centre in centres]
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4] == rows[5]
    assert columns[:3] == columns[3:] == sorted(columns[:3])


def test_grid_writes_the_labels() -> None:
    row = _solid((1, 1, 1))
    blank = np.asarray(sheet.grid([row], [" "], [" "]))
    assert (blank == 255).all()
    for labels in (["x"], [" "]), ([" "], ["x"]):
        assert (np.asarray(sheet.grid([row], *labels)) < 128).any()


@pytest.mark.parametrize("text", ["red heart", "w" * 80, "a very long name " * 9, ""])
def test_labels_fit_their_cell(text: str) -> None:
    font = ImageFont.load_default(13)
    lines = sheet._wrap(text, font, 96)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 96 for line in lines)
    if text == "red heart":
        assert lines == [text]
    if len(text) > 60:
        assert lines[-1].endswith("…")


def test_grid_refuses_what_does_not_fit_together() -> None:
    row = _solid((0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="all of one shape"):
        sheet.grid([row, row[:1]], ["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="all of one shape"):
        sheet.grid([], [], [])
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    with pytest.raises(ValueError, match="pictures of one size"):
        sheet.image_grid([images], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="rows of equal length"):
        sheet.image_grid([images[:1], images[:1] * 2], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="1 row labels and 3 column labels"):
        sheet.grid([row], ["a"], ["c", "d", "e"])


def test_png_bytes_reads_back() -> None:
    image = pixels.to_image(torch.rand(3, 16, 16) * 2 - 1)
    data = pixels.png_bytes(image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))
