"""How long the videos of a model are: frames of a video, and of its latents."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Video:
    """What a family of video models is trained for.

    Attributes:
        frames: of its published videos.
        step: frames of a video that one frame of latents stands for, but for the first, which
            stands for one alone.
        rate: frames a second.
    """

    frames: int
    step: int
    rate: int

    def latent_frames(self, frames: int) -> int:
        """Frames of the latents of a video with so many.

        Raises:
            ValueError: no whole number of them.
        """
        if frames < 1 or (frames - 1) % self.step:
            below = max(0, frames - 1) // self.step * self.step + 1
            raise ValueError(
                f"a video has 1 frame and a multiple of {self.step} more, got {frames}; use "
                f"{below} or {below + self.step}"
            )
        return (frames - 1) // self.step + 1
