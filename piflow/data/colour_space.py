"""Colour spaces that a picture names without a profile, as profiles (ICC).

* A PNG's or AVIF's code points (cICP, ITU-T H.273): primaries and curve by number. HDR (PQ, HLG) is
  refused, since how it looks on a screen of white isn't agreed.
* A PNG's gAMA and cHRM: an exponent, and primaries by their chromaticities.
* EXIF's Adobe RGB (1998), which cameras write: "uncalibrated" with interoperability index R03, or
  the color space 2.

Where several are there, a profile and what the PNG standard puts before others count first.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from piflow.storage.picture import BadPictureError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WHITE = (0.3127, 0.3290)  # D65: x, y
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # red, green, blue: x, y
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
_PRIMARIES = {  # by ColourPrimaries of H.273
    1: _SRGB,
    2: _SRGB,  # not said
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
_SRGB_CURVE = 0.0  # in place of an exponent
_EXPONENTS = {  # by TransferCharacteristics; those of television are shown with sRGB's curve
    **dict.fromkeys((1, 2, 6, 13, 14, 15), _SRGB_CURVE),
    4: 2.2,
    5: 2.8,
    8: 1.0,
}
_HDR = {16: "PQ", 18: "HLG"}
_ADOBE_EXPONENT = 563 / 256
_SRGB_EXPONENT = 1 / 0.45455  # what encoders of sRGB write into gAMA, and mean sRGB's curve by
_NEAR = 0.01

_EXIF_IFD, _INTEROP_IFD, _COLOR_SPACE, _INTEROP_INDEX = 0x8769, 0xA005, 0xA001, 1
_UNCALIBRATED, _ADOBE_RGB = 0xFFFF, 2

_Primaries = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def named_profile(image: Image.Image, model: str) -> bytes | None:
    """The profile of a colour space that a picture names; None: it names none, or sRGB.

    Args:
        image: as `open_picture` returns it.
        model: of the colours: RGB, L or CMYK.

    Raises:
        BadPictureError: the colours are HDR, or of primaries or a curve that aren't known here.
    """
    info = image.info
    if "cicp" in info and model != "CMYK":
        primaries, curve = info["cicp"]
        return _of_codes(primaries, curve, model)
    profile = info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        return profile
    if "srgb" in info or model == "CMYK":
        return None
    if "gamma" in info or "chromaticity" in info:
        return _of_png(info.get("gamma"), info.get("chromaticity"), model)
    return _written(_ADOBE, _WHITE, _ADOBE_EXPONENT, model) if _is_adobe(image) else None


def _of_codes(primaries: int, curve: int, model: str) -> bytes | None:
    if curve in _HDR:
        raise BadPictureError(
            f"its colours are HDR ({_HDR[curve]}), for which there is no one conversion; convert "
            "it to sRGB with the software that it comes from"
        )
    if primaries not in _PRIMARIES or curve not in _EXPONENTS:
        raise BadPictureError(
            f"its colours have primaries {primaries} and curve {curve} of ITU-T H.273, which "
            "aren't known here; convert it to sRGB"
        )
    return _written(_PRIMARIES[primaries], _WHITE, _EXPONENTS[curve], model)


def _of_png(
    gamma: float | None, chromaticity: tuple[float, ...] | None, model: str
) -> bytes | None:
    """Of gAMA, the exponent that encoded, and cHRM, white and primaries as x, y."""
    exponent = _SRGB_CURVE if not gamma else 1 / gamma
    if abs(exponent - _SRGB_EXPONENT) < _NEAR * _SRGB_EXPONENT:
        exponent = _SRGB_CURVE
    if chromaticity is None:
        return _written(_SRGB, _WHITE, exponent, model)
    pairs = list(zip(chromaticity[::2], chromaticity[1::2], strict=True))
    white, (red, green, blue) = pairs[0], pairs[1:]
    return _written((red, green, blue), white, exponent, model)


def _is_adobe(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        space = exif.get_ifd(_EXIF_IFD).get(_COLOR_SPACE)
        index = exif.get_ifd(_INTEROP_IFD).get(_INTEROP_INDEX)
    except Exception:  # EXIF is often damaged, and the picture is good without
        return False
    return space == _ADOBE_RGB or (space == _UNCALIBRATED and str(index).startswith("R03"))


@lru_cache(maxsize=64)
def _written(
    primaries: _Primaries, white: tuple[float, float], exponent: float, model: str
) -> bytes | None:
    """A profile (ICC, version 2) of primaries or grey and one curve; None: sRGB's own.

    Raises:
        BadPictureError: primaries of which no colour can be mixed, or an exponent out of range.
    """
    if exponent == _SRGB_CURVE and (model == "L" or _close(primaries, _SRGB)):
        return None
    tags = {b"wtpt": _xyz(_D50), **_curves(exponent, model)}
    if model == "RGB":
        columns = _columns(primaries, white)
        names = (b"rXYZ", b"gXYZ", b"bXYZ")
        tags |= {name: _xyz(column) for name, column in zip(names, columns.T, strict=True)}
    return _profile(tags, b"GRAY" if model == "L" else b"RGB ")


def _close(primaries: _Primaries, others: _Primaries) -> bool:
    return bool(np.abs(np.subtract(primaries, others)).max() < _NEAR / 2)


_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def _columns(primaries: _Primaries, white: tuple[float, float]) -> NDArray[np.float64]:
    """XYZ of red, green and blue as columns, as they look where white is D50 (Bradford)."""
    try:
        mixed = np.array([_of_chromaticity(*pair) for pair in primaries]).T
        there = _of_chromaticity(*white)
        columns = mixed * np.linalg.solve(mixed, there)
        scale = (_BRADFORD @ _D50) / (_BRADFORD @ there)
        adapted = np.linalg.solve(_BRADFORD, scale[:, None] * (_BRADFORD @ columns))
    except (np.linalg.LinAlgError, ZeroDivisionError) as error:
        raise BadPictureError(f"its primaries {primaries} mix no colours") from error
    if not np.abs(adapted).max() < 4:
        raise BadPictureError(f"its primaries {primaries} mix no colours")
    return adapted


def _of_chromaticity(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _curves(exponent: float, model: str) -> dict[bytes, bytes]:
    if exponent == _SRGB_CURVE:
        values = np.linspace(0, 1, 1024)
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        table = (linear * 65535).round().astype(">u2").tobytes()
    elif 0.1 <= exponent <= 10:
        table = struct.pack(">H", round(exponent * 256))
    else:
        raise BadPictureError(f"its gamma is 1/{exponent:g}, which no screen has")
    curve = b"curv\0\0\0\0" + struct.pack(">I", len(table) // 2) + table
    curve += b"\0" * (-len(curve) % 4)
    names = (b"kTRC",) if model == "L" else (b"rTRC", b"gTRC", b"bTRC")
    return dict.fromkeys(names, curve)


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(tags: dict[bytes, bytes], space: bytes) -> bytes:
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", *(round(value * 65536) for value in _D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
