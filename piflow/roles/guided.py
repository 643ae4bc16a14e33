"""A teacher under classifier-free guidance."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from piflow.backbones import Conditioning
from piflow.backbones.base import PATCH
from piflow.config.objective import GuidanceConfig
from piflow.flow import Velocity
from piflow.guidance import guided_teacher


class TeacherVelocity(Protocol):
    """What can be guided: a `Trio`, or a bare `Backbone`."""

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor: ...


class GuidedTeacher:
    """A teacher under classifier-free guidance, as a function (x, sigma) -> velocity.

    Positive and negative prompt go through the model as one doubled batch. The call is the same on
    all workers whatever sigma is, since every forward pass is a collective.

    Args:
        teacher: a trio or a bare backbone.
        cond: B prompts.
        negative: the negative prompt, one or B; not used when `guidance.scale` is 1, nor where
            `cond` brings negative prompts of its own. It edits the same pictures as the prompts,
            where the model edits some.
        guidance: scale, sigma interval and orthogonal share.

    Raises:
        ValueError: guidance without a negative prompt.
    """

    def __init__(
        self,
        teacher: TeacherVelocity,
        cond: Conditioning,
        negative: Conditioning | None,
        guidance: GuidanceConfig,
    ) -> None:
        if guidance.scale == 1.0:
            self._velocity = _velocity_of(teacher, cond)
            return
        negative = negative if cond.negative is None else cond.negative
        if negative is None:
            raise ValueError(
                f"guidance.scale {guidance.scale} needs the negative prompt's conditioning, got "
                "none: pass it, or set guidance.scale to 1"
            )
        unguided = negative.expand(cond.batch_size).editing(cond.condition)
        both = Conditioning.cat([cond, unguided])  # without negative prompts: `unguided` has none
        self._velocity = guided_teacher(
            _velocity_of(teacher, both),
            guidance.scale,
            guidance.interval,
            guidance.orthogonal,
            PATCH if guidance.keep_norm else None,
        )

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """`(B, C, H, W)`, `(B,)` -> guided velocity `(B, C, H, W)`, float32, without gradient."""
        return self._velocity(x, sigma)


def _velocity_of(teacher: TeacherVelocity, cond: Conditioning) -> Velocity:
    return lambda x, sigma: teacher.teacher_velocity(x, sigma, cond)
