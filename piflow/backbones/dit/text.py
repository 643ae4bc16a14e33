"""Class labels in place of text, for class-conditional models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from piflow.backbones.text import Embedding
from piflow.config import ClassLabelEncoderConfig
from piflow.storage.fingerprint import EncoderIdentity


def identity(config: ClassLabelEncoderConfig) -> EncoderIdentity:
    """There are no weights: the number of classes is all that decides."""
    name = f"class-label-{config.num_classes}"
    return EncoderIdentity(
        name=name,
        weights_sha256=hashlib.sha256(name.encode()).hexdigest(),
        max_tokens=1,
        hidden_size=1,
    )


def to_class(prompt: str, num_classes: int) -> int:
    """A prompt's class; the empty prompt is the null class, `num_classes`.

    Raises:
        ValueError: it isn't a whole number of 0 … num_classes - 1.
    """
    if prompt == "":
        return num_classes
    if not (prompt.isascii() and prompt.isdecimal()) or int(prompt) >= num_classes:
        raise ValueError(
            f"the prompt {prompt!r} is not a class of encoder.num_classes = {num_classes}; write "
            f"whole numbers from 0 to {num_classes - 1}, or the empty prompt for no class"
        )
    return int(prompt)


class ClassLabels:
    """One token of zeros, for families without text; pooled holds the class's number."""

    def __init__(self, config: ClassLabelEncoderConfig) -> None:
        self.identity = identity(config)
        self._num_classes = config.num_classes

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Always one."""
        return [1] * len(prompts)

    def forward(self, prompts: Sequence[str]) -> list[Embedding]:
        """Float32 holds every class number below 2^24 exactly."""
        return [
            Embedding(torch.zeros(1, 1), torch.tensor([float(to_class(text, self._num_classes))]))
            for text in prompts
        ]
