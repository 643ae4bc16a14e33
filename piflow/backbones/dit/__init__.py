"""Class-conditional DiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from piflow.config import EncoderConfig, Family, Published
from piflow.config.section import Positive


class ClassLabelEncoderConfig(EncoderConfig):
    """No text: a prompt is a class number; the empty prompt is the null class."""

    module = "piflow.backbones.dit.text"
    tiny = "piflow.backbones.dit.tiny"

    type: Literal["class_label"] = "class_label"
    num_classes: Positive = 1000
    """Prompts are 0 .. num_classes - 1."""

    def to_class(self, prompt: str) -> int:
        """A prompt's class; the empty prompt is the null class, `num_classes`.

        Raises:
            ValueError: it isn't a whole number of 0 … num_classes - 1.
        """
        if prompt == "":
            return self.num_classes
        if not (prompt.isascii() and prompt.isdecimal()) or int(prompt) >= self.num_classes:
            raise ValueError(
                f"the prompt {prompt!r} is not a class of encoder.num_classes = "
                f"{self.num_classes}; write whole numbers from 0 to {self.num_classes - 1}, or the "
                "empty prompt for no class"
            )
        return int(prompt)

    def check_prompt(self, prompt: str) -> None:
        """Refuses what `to_class` does."""
        self.to_class(prompt)

    def example_prompts(self, texts: Sequence[str]) -> list[str]:
        """The first classes."""
        return [str(number) for number in range(min(self.num_classes, len(texts)))]


FAMILY = Family(
    backbone="piflow.backbones.dit.backbone:DiTBackbone",
    encoders=(ClassLabelEncoderConfig,),
    packs_latents=False,  # the model cuts its patches itself
    tiny="piflow.backbones.dit.tiny",
    pipeline="piflow.inference.dit:PiDiTPipeline",
    published=Published("DiT-XL/2 of 256x256", size=256),
)
