"""Pictures of any mode and colour space -> 8-bit sRGB on white.

* A colour profile (ICC) in the file is followed: colours are converted to sRGB, relative
  colorimetric with black point compensation. A profile that means sRGB within `_SAME` levels
  changes nothing. A broken one, or one of another colour model than the picture's, is said in the
  log, and the picture is taken as sRGB. So is one without a profile.
* A colour space that is named in another way (`colour_space.py`) is followed in the same way.
* CMYK without a profile is converted as Pillow does, by subtraction from white.
* Palettes are resolved; what is transparent shows white.
* Of 16-bit numbers the upper 8 bits count, in grey as in colours.
* 32-bit numbers have no agreed white, LAB without a profile no agreed ground: both are refused.
"""

from __future__ import annotations

import hashlib
import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from piflow.data.colour_space import named_profile
from piflow.storage.foreign import shown
from piflow.storage.picture import BadPictureError

_log = logging.getLogger(__name__)

_SAME = 2  # levels of 256: profiles of sRGB differ in rounding and in how they write its curve

_BAND_PIXELS = 2**20  # converted at a time, so that copies stay small

_MODELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of profiles -> Pillow's mode

_said: set[str] = set()  # broken profiles that the log of this process has

_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def to_srgb(image: Image.Image, name: str = "a picture") -> Image.Image:
    """A decoded picture in mode RGB, its colours in sRGB; see the module's rules.

    Args:
        name: for the log, if the picture's profile is broken.

    Raises:
        BadPictureError: numbers of more than 16 bits, or a mode without a rule.
    """
    stored = image
    if image.mode in _DEEP_GREY:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    model = _colour_model(image)
    transform = _transform(named_profile(stored, model), model, name)
    if image.mode == "RGB" and transform is None and not image.has_transparency_data:
        return image
    result = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_band(band, model, transform), (0, top))
    return result


def _colour_model(image: Image.Image) -> str:
    """The mode in which the picture's colours are converted: RGB, L or CMYK."""
    if image.mode in ("1", "L", "LA", "La"):
        return "L"
    if image.mode in ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr"):
        return "RGB"
    if image.mode == "CMYK":
        return "CMYK"
    raise BadPictureError(
        f"its numbers have more than 16 bits, or no colours that are known here (Pillow's mode "
        f"{shown(image.mode)}); convert it to 8-bit RGB"
    )


def _band(
    band: Image.Image, model: str, transform: ImageCms.ImageCmsTransform | None
) -> Image.Image:
    if not band.has_transparency_data:
        colours = band.convert(model)
        converted = colours if transform is None else ImageCms.applyTransform(colours, transform)
        return converted.convert("RGB")  # type: ignore[union-attr]  # None only in place
    layer = band.convert("RGBA")
    if transform is not None:
        alpha = layer.getchannel("A")
        colours = layer.convert("RGB").convert(model)
        converted = ImageCms.applyTransform(colours, transform)
        layer = converted.convert("RGBA")  # type: ignore[union-attr]
        layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _transform(profile: bytes | None, model: str, name: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None: colours stay as they are."""
    if profile is None:
        return None
    transform, problem = _built(profile, model)
    if problem:
        digest = hashlib.sha256(profile).hexdigest()[:12]
        if digest not in _said:  # a profile comes with thousands of pictures
            _said.add(digest)
            _log.warning(
                "the colour profile (sha256 %s) of %s %s; taken as sRGB", digest, name, problem
            )
    return transform


@lru_cache(maxsize=64)
def _built(profile: bytes, model: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """A transform to sRGB, or None, and what is wrong with the profile."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = source.profile.xcolor_space
        if _MODELS.get(found) != model:
            return None, f"is of colours {shown(repr(found.strip()))}, the picture has {model}"
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            model,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return (None if _changes_nothing(transform, model) else transform), ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return None, f"is broken ({shown(error)})"


def _changes_nothing(transform: ImageCms.ImageCmsTransform, model: str) -> bool:
    """Whether a grid of colours comes out as it went in, but for rounding."""
    if model == "CMYK":
        return False
    levels = np.linspace(0, 255, 9 if model == "RGB" else 256).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(model), indexing="ij"), -1)
    before = Image.fromarray(grid.reshape(1, -1, 3) if model == "RGB" else grid.reshape(1, -1))
    after = ImageCms.applyTransform(before, transform)
    difference = np.asarray(after, np.int16) - np.asarray(before.convert("RGB"), np.int16)
    return int(np.abs(difference).max()) <= _SAME
