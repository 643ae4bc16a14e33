"""Colour profiles, depths and transparency."""

from __future__ import annotations

import io
import logging
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from piflow.data.colour import to_srgb
from piflow.storage.picture import open_picture

# colours of red, green and blue in XYZ at D50
ADOBE = np.array(
    [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]]
)
GAMMA = 563 / 256


def profile(colours: np.ndarray, gamma: float = GAMMA, space: bytes = b"RGB ") -> bytes:
    """An ICC profile, version 2, of three primaries and one curve."""

    def xyz(values: Any) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz([0.9642, 1.0, 0.8249])}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {name: xyz(c) for name, c in zip([b"rXYZ", b"gXYZ", b"bXYZ"], colours, strict=True)}
        tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ "
    )
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def expected(colour: tuple[int, int, int], colours: np.ndarray) -> np.ndarray:
    """The same colour in sRGB, by the definition."""
    linear = (np.array(colour) / 255) ** GAMMA @ colours @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def stored(image: Image.Image, icc: bytes | None, kind: str = "PNG") -> Image.Image:
    """As it comes back from a file."""
    sink = io.BytesIO()
    image.save(sink, kind, icc_profile=icc)
    return open_picture(sink.getvalue())


@pytest.mark.parametrize("colour", [(128, 200, 128), (200, 100, 60), (90, 90, 90), (255, 255, 255)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_wide_gamut_is_converted_to_srgb(colour: tuple[int, int, int], mode: str) -> None:
    plain = Image.new("RGB", (9, 2000), colour)
    picture = stored(plain.quantize(4) if mode == "P" else plain.convert(mode), profile(ADOBE))
    assert picture.mode == mode
    found = to_srgb(picture)
    assert found.mode == "RGB" and found.size == (9, 2000)
    want = expected(colour, ADOBE)
    for place in ((0, 0), (8, 1999)):
        assert np.abs(np.array(found.getpixel(place)) - want).max() <= 2


def test_a_profile_whose_green_is_called_red_is_followed() -> None:
    swapped = profile(ADOBE[[1, 0, 2]])
    red, green, _ = to_srgb(stored(Image.new("RGB", (4, 4), (200, 60, 60)), swapped)).getpixel(
        (1, 1)
    )
    assert green > 150 > red


def test_a_profile_that_means_srgb_changes_nothing() -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (own, None):
        assert np.array_equal(np.asarray(to_srgb(stored(Image.fromarray(values), icc))), values)


def test_grey_follows_its_curve() -> None:
    picture = stored(Image.new("L", (4, 4), 128), profile(ADOBE, 1.0, b"GRAY"))
    found = to_srgb(picture).getpixel((1, 1))
    assert all(abs(value - 188) <= 2 for value in found)  # 128/255 of linear light


@pytest.mark.parametrize(
    ("icc", "mode", "message"),
    [
        (b"no profile at all", "RGB", "is broken"),
        (profile(ADOBE)[:-40], "RGB", "is broken"),
        (profile(ADOBE), "L", "is of colours 'RGB', the picture has L"),
        (profile(ADOBE, 1.0, b"GRAY"), "RGB", "is of colours 'GRAY', the picture has RGB"),
    ],
)
def test_a_broken_profile_is_said_and_taken_as_srgb(
    icc: bytes, mode: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = to_srgb(stored(Image.new(mode, (4, 4), "teal"), icc), "picture 'a.png'")
    plain = Image.new(mode, (4, 4), "teal").convert("RGB")
    assert found.getpixel((1, 1)) == plain.getpixel((1, 1))
    assert message in caplog.text and "picture 'a.png'" in caplog.text


def test_cmyk_without_a_profile_is_subtracted_from_white() -> None:
    picture = stored(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), None, "TIFF")
    assert to_srgb(picture).getpixel((1, 1)) == (255, 0, 0)


def test_half_transparent_colours_lie_on_white_after_their_conversion() -> None:
    picture = stored(Image.new("RGBA", (4, 4), (200, 100, 60, 128)), profile(ADOBE))
    want = expected((200, 100, 60), ADOBE) * 128 / 255 + 127
    assert np.abs(np.array(to_srgb(picture).getpixel((1, 1))) - want).max() <= 2


def test_sixteen_bits_of_colour_and_grey_keep_their_upper_eight() -> None:
    deep = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert to_srgb(stored(deep, None)).getpixel((1, 1)) == (128, 128, 128)
    assert to_srgb(stored(deep, profile(ADOBE, 1.0, b"GRAY"))).getpixel((1, 1)) == pytest.approx(
        (188,) * 3, abs=2
    )
