from __future__ import annotations

import pytest
import torch

from piflow.backbones import build_codec
from piflow.backbones.codec import PixelCodec
from piflow.config import ModelConfig


def test_round_trip_is_exact() -> None:
    pictures = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = PixelCodec().encode(pictures)
    assert latents.shape == (2, *PixelCodec().latent_shape(8, 12))
    assert torch.equal(PixelCodec().decode(latents), pictures)


def test_channels_are_colour_major_then_position() -> None:
    """Channel 4c + 2i + j of a latent pixel is colour c at row i, column j of its 2×2 square."""
    pictures = torch.arange(3 * 4 * 4, dtype=torch.float32).reshape(1, 3, 4, 4)
    latents = PixelCodec().encode(pictures)
    for channel in range(12):
        colour, row, column = channel // 4, channel // 2 % 2, channel % 2
        assert latents[0, channel, 1, 0] == pictures[0, colour, 2 + row, column]


@pytest.mark.parametrize(("height", "width"), [(0, 8), (6, 8), (8, 7)])
def test_sizes_that_do_not_fit(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 4 pixels, got {height}×{width}"):
        PixelCodec().latent_shape(height, width)


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        PixelCodec().encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 12, h, w\), got \(1, 4, 8, 8\)"):
        PixelCodec().decode(torch.zeros(1, 4, 8, 8))


def test_recipe_names_the_codec() -> None:
    assert isinstance(build_codec(ModelConfig(path="x", codec="pixels")), PixelCodec)
