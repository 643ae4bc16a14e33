"""Tensors to pixels, and pixels to files: PNG of pictures, animated WebP of videos.

A video is a picture of all its frames, one below the other, as its latents are.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

_ENLARGED_SIDE = 256  # pixels: nothing is enlarged beyond
_MOST_ENLARGED = 4  # screen pixels a pixel
_STRIP = 5  # frames of a video that stand for it where a page or a sheet shows pictures
_WEBP_QUALITY = 90


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


def frames_of(picture: Tensor, frames: int) -> Tensor:
    """A video ``(..., 3, N·H, W)``, its N frames one below the other -> ``(..., N, 3, H, W)``."""
    return picture.unflatten(-2, (frames, -1)).movedim(-3, -4)


def strip(picture: Tensor, frames: int) -> Tensor:
    """What a page or a sheet shows of a video: 5 frames or fewer, from first to last, in a row.

    Args:
        picture: ``(..., 3, N·H, W)``, its N frames one below the other.
        frames: N; a picture, of one frame, stays as it is.
    """
    if frames == 1:
        return picture
    chosen = torch.linspace(0, frames - 1, min(frames, _STRIP)).round().long()
    apart = frames_of(picture, frames)
    return torch.cat([apart[..., number, :, :, :] for number in chosen.tolist()], dim=-1)


def webp_bytes(picture: Tensor, frames: int, rate: float) -> bytes:
    """A video as an animated WebP file's bytes, which is played for ever.

    Args:
        picture: ``(3, N·H, W)`` in [-1, 1], its N frames one below the other.
        frames: N.
        rate: frames a second.
    """
    first, *others = [enlarged(to_image(frame)) for frame in frames_of(picture, frames)]
    buffer = io.BytesIO()
    first.save(
        buffer, format="WEBP", save_all=True, append_images=others,
        duration=round(1000 / rate), loop=0, quality=_WEBP_QUALITY,
    )  # fmt: skip
    return buffer.getvalue()


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
