"""Class labels in place of text, for class-conditional models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from piflow.backbones.dit import ClassLabelEncoderConfig
from piflow.backbones.text import Embedding
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


class ClassLabels:
    """One token of zeros, for families without text; pooled holds the class's number."""

    def __init__(self, config: ClassLabelEncoderConfig) -> None:
        self.identity = identity(config)
        self._to_class = config.to_class

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Always one."""
        return [1] * len(prompts)

    def forward(self, prompts: Sequence[str]) -> list[Embedding]:
        """Float32 holds every class number below 2^24 exactly."""
        return [
            Embedding(torch.zeros(1, 1), torch.tensor([float(self._to_class(prompt))]))
            for prompt in prompts
        ]


def load(config: ClassLabelEncoderConfig, device: str) -> ClassLabels:
    """There is nothing to load, so the device doesn't matter."""
    return ClassLabels(config)
