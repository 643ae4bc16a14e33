"""Colour profiles, depths and transparency."""

from __future__ import annotations

import io
import logging
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo

from piflow.data.colour import to_srgb
from piflow.storage.picture import BadPictureError, _box, open_picture

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


# ------------------------------------------------------------- colour spaces without a profile

COLOUR = (128, 200, 128)
P3 = np.array([[0.5151, 0.2412, -0.0011], [0.2920, 0.6922, 0.0419], [0.1571, 0.0666, 0.7841]])
BT2020 = np.array([[0.6735, 0.2790, -0.0019], [0.1657, 0.6753, 0.0300], [0.1251, 0.0457, 0.7968]])


def encoded(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decoded(colour: tuple[int, int, int]) -> np.ndarray:
    values = np.array(colour) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def with_exif(space: int, index: str | None, kind: str = "JPEG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    ifd = exif.get_ifd(0x8769)
    ifd[0xA001] = space
    if index is not None:
        ifd[0xA005] = {1: index}
    sink = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    Image.new("RGB", (8, 16), COLOUR).save(sink, kind, exif=exif, **options)
    return sink.getvalue()


def png(icc: bytes | None = None, mode: str = "RGB", **chunks: bytes) -> bytes:
    info = PngInfo()
    for name, content in chunks.items():
        info.add(name.encode(), content)
    sink = io.BytesIO()
    Image.new("RGB", (4, 4), COLOUR).convert(mode).save(sink, "PNG", pnginfo=info, icc_profile=icc)
    return sink.getvalue()


def colour_of(content: bytes) -> np.ndarray:
    return np.array(to_srgb(open_picture(content)).getpixel((2, 2)))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize(("space", "index"), [(0xFFFF, "R03"), (2, None), (2, "R03")])
def test_adobe_rgb_of_a_camera_is_converted(
    space: int, index: str | None, kind: str, orientation: int
) -> None:
    found = colour_of(with_exif(space, index, kind, orientation))
    assert np.abs(found - expected(COLOUR, ADOBE)).max() <= 3
    assert np.abs(found - COLOUR).max() > 20, "the conversion is to be seen"


@pytest.mark.parametrize(
    ("space", "index"), [(1, "R98"), (1, None), (0xFFFF, None), (0xFFFF, "R98")]
)
def test_other_exif_is_srgb(space: int, index: str | None) -> None:
    assert np.abs(colour_of(with_exif(space, index, "WEBP")) - COLOUR).max() == 0


def test_a_profile_goes_before_exif() -> None:
    sink = io.BytesIO()
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = open_picture(with_exif(0xFFFF, "R03", "WEBP"))
    image.save(sink, "WEBP", lossless=True, icc_profile=own, exif=image.getexif())
    assert np.abs(colour_of(sink.getvalue()) - COLOUR).max() == 0


def test_linear_numbers_are_encoded() -> None:
    """As renderers write them: gAMA 1."""
    linear = png(gAMA=struct.pack(">I", 100_000))
    assert np.abs(colour_of(linear) - encoded(np.array(COLOUR) / 255)).max() <= 1
    grey = colour_of(png(mode="L", gAMA=struct.pack(">I", 100_000)))
    level = np.asarray(Image.new("RGB", (1, 1), COLOUR).convert("L"))[0, 0] / 255
    assert np.abs(grey - encoded(np.array([level] * 3))).max() <= 1


SRGB_XY = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE_XY = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


@pytest.mark.parametrize(
    "chunks",
    [
        {"gAMA": struct.pack(">I", 45455)},
        {"gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *SRGB_XY)},
        {"cHRM": struct.pack(">8I", *SRGB_XY)},
        {"gAMA": struct.pack(">I", 100_000), "sRGB": b"\0"},
        {"cICP": bytes([1, 13, 0, 1])},
        {"cICP": bytes([1, 13, 0, 1]), "gAMA": struct.pack(">I", 100_000)},
        {"cICP": bytes([2, 2, 0, 1])},
    ],
)
def test_what_means_srgb_changes_nothing(chunks: dict[str, bytes]) -> None:
    assert np.array_equal(colour_of(png(**chunks)), COLOUR)
    assert np.array_equal(colour_of(png(mode="RGBA", **chunks)), COLOUR)


def test_primaries_of_a_png_are_followed() -> None:
    found = colour_of(
        png(gAMA=struct.pack(">I", round(1e5 / GAMMA)), cHRM=struct.pack(">8I", *ADOBE_XY))
    )
    want = encoded(decoded(COLOUR) @ ADOBE @ np.linalg.inv(SRGB))  # gAMA is near to sRGB's
    assert np.abs(found - want).max() <= 3


@pytest.mark.parametrize(("code", "colours"), [(12, P3), (9, BT2020)])
@pytest.mark.parametrize("icc", [None, profile(ADOBE)])
def test_code_points_are_followed(code: int, colours: np.ndarray, icc: bytes | None) -> None:
    found = colour_of(png(icc, cICP=bytes([code, 13, 0, 1])))
    want = encoded(decoded(COLOUR) @ colours @ np.linalg.inv(SRGB))
    assert np.abs(found - want).max() <= 2
    assert np.abs(found - COLOUR).max() > 10


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"cICP": bytes([9, 16, 0, 1])}, r"its colours are HDR \(PQ\)"),
        ({"cICP": bytes([9, 18, 0, 1])}, r"its colours are HDR \(HLG\)"),
        ({"cICP": bytes([200, 13, 0, 1])}, "primaries 200 and curve 13"),
        ({"cHRM": struct.pack(">8I", *[0] * 8)}, "mix no colours"),
        ({"cHRM": struct.pack(">8I", *[31270, 32900] * 4)}, "mix no colours"),
        ({"cHRM": struct.pack(">8I", *[2**32 - 1, 1] * 4)}, "mix no colours"),
        ({"gAMA": struct.pack(">I", 1)}, "gamma is 1/100000, which no screen has"),
    ],
)
def test_colours_that_cannot_be_shown_are_refused(chunks: dict[str, bytes], message: str) -> None:
    with pytest.raises(BadPictureError, match=message):
        colour_of(png(**chunks))


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_code_points_of_an_avif() -> None:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16), COLOUR).save(sink, "AVIF", quality=100, subsampling="4:4:4")
    plain = sink.getvalue()
    assert plain.count(b"colrnclx") == 1
    assert np.abs(colour_of(plain) - COLOUR).max() <= 2

    def coded(primaries: int, curve: int) -> bytes:
        start = plain.index(b"colrnclx") + 8
        return plain[:start] + struct.pack(">HH", primaries, curve) + plain[start + 4 :]

    want = encoded(decoded(COLOUR) @ P3 @ np.linalg.inv(SRGB))
    assert np.abs(colour_of(coded(12, 13)) - want).max() <= 4
    with pytest.raises(BadPictureError, match="HDR"):
        colour_of(coded(9, 16))


@given(st.binary(max_size=80))
def test_boxes_of_any_bytes_have_an_end(content: bytes) -> None:
    assert isinstance(_box(content, b"meta/iprp/ipco/colr"), bytes)
    assert isinstance(_box(b"\0\0\0\x50meta" + content, b"meta/iprp/ipco/colr"), bytes)
