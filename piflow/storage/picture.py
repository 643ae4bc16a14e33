"""Picture files from outside: the one place where they are opened.

Decoders are programs that read hostile data, and some of Pillow's start others (EPS starts
Ghostscript). So only formats of a short list are tried, by content, whatever a name says; and no
pixel is decoded before the header's size is known.
"""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError, features

from piflow.storage.foreign import refuse_lfs_pointer, shown

MAX_PICTURE_BYTES = 512 * 2**20
"""Of a picture's file."""

MAX_PIXELS = 64 * 2**20
"""Of a decoded picture, where nothing else is said; Pillow takes 4 bytes for each."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP") + (
    ("AVIF",) if features.check("avif") else ()
)

_TILE_TAGS = (322, 323)  # TIFF: width and height of a tile, which is decoded whole

_ORIENTATION = 0x0112  # EXIF's tag

_LYING = (5, 6, 7, 8)  # its values of pictures that are turned by a right angle

_PNG = b"\x89PNG\r\n\x1a\n"

_MOST_PARTS = 1000  # of a file, before its pixels

_OTHERS = (  # what a file begins with -> what it is
    (b"%!PS", "an EPS or PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (b"%PDF", "a PDF file"),
    (b"8BPS", "a Photoshop file"),
    (b"<svg", "an SVG file"),
    (b"<?xml", "an XML file"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (b"\xffO\xffQ", "a JPEG 2000 file"),
    (b"\0\0\x01\0", "an icon file"),
    (b"v/1\x01", "an OpenEXR file"),
    (b"DDS ", "a DirectDraw surface"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a ZIP file"),
)


class BadPictureError(ValueError):
    """A picture that can't be used; the message says why."""


def open_picture(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file's content, decoded and turned as its EXIF data says.

    PNG, JPEG, WebP, GIF, TIFF, BMP and, where Pillow has it, AVIF; of several frames or pages the
    first. Mode, palette, transparency and the colour profile in `info` are as the file has them;
    so are, as ``cicp``, the numbers of primaries and curve that a PNG or an AVIF may have.

    Raises:
        BadPictureError: another format, a damaged file, or more pixels than `max_pixels`.
    """
    try:
        refuse_lfs_pointer(content[:64], where="it")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_size(image, max_pixels)
            image.load()
            codes = _colour_codes(content, image)
            if codes is not None:
                image.info["cicp"] = codes
            return ImageOps.exif_transpose(image)
    except (MemoryError, BadPictureError):
        raise
    except UnidentifiedImageError as error:
        # its message holds an address in memory; ours are the same always
        raise BadPictureError(f"{_kind(content)}; expected {_named_formats()}") from error
    except Exception as error:  # damaged bytes lead Pillow's plugins to all kinds of errors
        raise BadPictureError(f"not a readable image file ({shown(error)})") from error


def size_of(content: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a picture file's content, turned as `open_picture` does.

    The header says it in most formats; a PNG's data on how it is turned may lie behind its pixels.

    Raises:
        BadPictureError: another format, a damaged header, or more pixels than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_size(image, max_pixels)
            if image.getexif().get(_ORIENTATION) in _LYING:
                return image.width, image.height
            return image.height, image.width
    except (MemoryError, BadPictureError):
        raise
    except UnidentifiedImageError as error:
        raise BadPictureError(f"{_kind(content)}; expected {_named_formats()}") from error
    except Exception as error:
        raise BadPictureError(f"not a readable image file ({shown(error)})") from error


def pixels_of(content: bytes) -> int:
    """How many pixels the header of a picture's file promises; 0 if it can't be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # `open_picture` says what is wrong
        return 0


def _require_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadPictureError(
            f"{height}x{width} pixels, at most {max_pixels} in all are decoded; scale it down, or "
            "raise embed.max_picture_pixels"
        )
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
    if tile[0] * tile[1] > max(max_pixels, 2**20):
        raise BadPictureError(f"tiles of {tile[1]}x{tile[0]} pixels, at most {max_pixels} in all")


def _colour_codes(content: bytes, image: Image.Image) -> tuple[int, int] | None:
    """ColourPrimaries and TransferCharacteristics (ITU-T H.273), which Pillow passes over.

    In a PNG they go before a profile, in an AVIF behind it.
    """
    if image.format == "PNG":
        place = len(_PNG)
        for _ in range(_MOST_PARTS):
            size, name = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
            if name == b"cICP" and size == 4:
                return content[place + 8], content[place + 9]
            if name in (b"IDAT", b"IEND", b""):
                break
            place += 12 + size
    if image.format == "AVIF" and not image.info.get("icc_profile"):
        found = _box(content, b"meta/iprp/ipco/colr")
        if found[:4] == b"nclx" and len(found) >= 8:
            return int.from_bytes(found[4:6]), int.from_bytes(found[6:8])
    return None


def _box(content: bytes, path: bytes) -> bytes:
    """The first box of an ISO media file by its path; empty if there is none."""
    for wanted in path.split(b"/"):
        place = 4 if wanted == b"iprp" else 0  # "meta" begins with a version and flags
        for _ in range(_MOST_PARTS):
            size, name = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
            if name == wanted or size < 8:
                break
            place += size
        if name != wanted:
            return b""
        content = content[place + 8 : place + size if size else None]
    return content


def _kind(content: bytes) -> str:
    head = content.lstrip()[:16] if content[:1].isspace() else content[:16]
    for beginning, kind in _OTHERS:
        if head.lower().startswith(beginning.lower()):
            return kind
    if content[4:8] == b"ftyp":
        return f"a file of the brand {shown(repr(content[8:12].decode('latin-1')))} (HEIF, video)"
    return "no picture of a known kind" if content else "an empty file"


def _named_formats() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
