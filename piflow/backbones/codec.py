"""Between pictures and a backbone's latents."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class PixelCodec:
    """RGB itself, space-to-depth by 2: 12 latent channels, lossless, no weights.

    Pictures are `(B, 3, H, W)` in [-1, 1]; latents `(B, 12, H/2, W/2)`.
    """

    channels = 12
    factor = 2

    def encode(self, pictures: Tensor) -> Tensor:
        """`(B, 3, H, W)` -> `(B, 12, H/2, W/2)`.

        Raises:
            ValueError: not RGB, or a height or width that is odd.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(pictures.shape)}")
        self.latent_shape(pictures.shape[2], pictures.shape[3])
        return F.pixel_unshuffle(pictures, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """`(B, 12, h, w)` -> `(B, 3, 2h, 2w)`; values are not clamped.

        Raises:
            ValueError: not 12 latent channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents must be (B, {self.channels}, h, w), got {tuple(latents.shape)}"
            )
        return F.pixel_shuffle(latents, self.factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents; the backbone's 2×2 patches need h and w even.

        Raises:
            ValueError: height or width isn't a positive multiple of 4 pixels.
        """
        step = 2 * self.factor
        if height <= 0 or width <= 0 or height % step or width % step:
            raise ValueError(
                f"picture sizes must be positive multiples of {step} pixels, got {height}×{width}"
            )
        return self.channels, height // self.factor, width // self.factor
