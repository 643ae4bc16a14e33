"""Tensors to pixels, and pixels to PNG files."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

_ENLARGED_SIDE = 256  # pixels: nothing is enlarged beyond
_MOST_ENLARGED = 4  # screen pixels a pixel


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


def enlargement(height: int, width: int) -> int:
    """Screen pixels for a pixel of a picture: 1 from 256 pixels a side on, at most 4."""
    return max(1, min(_MOST_ENLARGED, _ENLARGED_SIDE // max(height, width)))


def to_image(picture: Tensor) -> Image.Image:
    """One picture ``(3, H, W)`` in [-1, 1] as an RGB image, pixel by pixel."""
    return Image.fromarray(to_uint8(picture).numpy())


def enlarged(image: Image.Image) -> Image.Image:
    """The image by `enlargement`, without smoothing."""
    factor = enlargement(image.height, image.width)
    size = (image.width * factor, image.height * factor)
    return image if factor == 1 else image.resize(size, Image.Resampling.NEAREST)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
