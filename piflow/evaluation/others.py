"""Somebody else's few-step model, as every process of an evaluation knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from piflow.config import OtherStudentConfig


@dataclass(frozen=True)
class Other:
    """A model that was found and fits, with nothing large read; plain values.

    Attributes:
        config: its places are absolute; a base on a hub is at a commit.
        identity: what decides its pictures beside prompts, noise and size, as a hash.
        same_noise: whether it starts from the noise of teacher and student.
    """

    config: OtherStudentConfig
    identity: str
    same_noise: bool

    def to_json(self) -> str:
        """For another process."""
        config = self.config.model_dump(mode="json")
        return json.dumps([config, self.identity, self.same_noise])

    @classmethod
    def from_json(cls, text: str) -> Other:
        config, identity, same_noise = json.loads(text)
        return cls(OtherStudentConfig.model_validate(config), identity, same_noise)
