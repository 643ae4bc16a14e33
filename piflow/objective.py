"""Training objectives on one micro-batch: π-ID distillation and flow-matching pre-training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from piflow.backbones.base import Backbone, Conditioning
from piflow.backbones.codec import PixelCodec
from piflow.batch import MicroBatch, conditioning
from piflow.config import FlowMatchingConfig, PiIDConfig, Recipe
from piflow.imitation import run_data_free, teacher_ratio
from piflow.schedule import FlowSchedule, segments
from piflow.step import Backward
from piflow.trio import GuidedTeacher, Trio


class PiIDObjective:
    """Data-free π-ID (arXiv 2510.14974, section 4): all segments of a trajectory from noise.

    Args:
        trio: teacher and student over one backbone.
        negative: conditioning of the empty prompt, batch of 1, for classifier-free guidance.
    """

    def __init__(
        self,
        trio: Trio,
        codec: PixelCodec,
        negative: Conditioning,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        if not isinstance(recipe.objective, PiIDConfig):
            raise ValueError(f"expected objective.type pi_id, got {recipe.objective.type}")
        self.trio = trio
        self.codec = codec
        self.negative = negative
        self.config = recipe.objective
        self.guidance = recipe.guidance
        self.dropout = recipe.policy.dropout
        self.device = device
        self.schedule = FlowSchedule(self.config.shift)
        self.segments = segments(self.config.nfe, self.config.final_step_size_scale)

    def __call__(
        self, batch: MicroBatch, step: int, generator: torch.Generator, backward: Backward
    ) -> Tensor:
        cond = conditioning(batch, self.device)
        shape = (len(batch.prompts), *self.codec.latent_shape(batch.height, batch.width))
        total = torch.zeros((), device=self.device, dtype=torch.float64)

        def add_up(loss: Tensor, last: bool) -> None:
            total.add_(loss.detach())
            backward(loss, last)

        run_data_free(
            lambda x, sigma: self.trio.student(x, sigma, cond),
            GuidedTeacher(self.trio, cond, self.negative, self.guidance),
            torch.randn(shape, generator=generator).to(self.device),
            self.schedule,
            self.segments,
            num_states=self.config.num_intermediate_states,
            window_substeps=self.config.window_substeps,
            teacher_ratio=teacher_ratio(step, self.config.num_decay_iters),
            dropout=self.dropout,
            generator=generator,
            total_substeps=self.config.total_substeps,
            scale=self.config.loss_scale,
            backward=add_up,
        )
        return total


class FlowMatchingObjective:
    """Flow matching: predict u = ε - x0 at a random noise level, mean squared error.

    Args:
        backbone: the model being trained.
        pictures: (prompts, generator) -> pictures ``(m, 3, H, W)`` in [-1, 1].
        empty: conditioning of the empty prompt, batch of 1, put in for `prompt_dropout` of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        codec: PixelCodec,
        pictures: Callable[[Sequence[str], torch.Generator], Tensor],
        empty: Conditioning,
        config: FlowMatchingConfig,
        device: torch.device,
    ) -> None:
        self.backbone = backbone
        self.codec = codec
        self.pictures = pictures
        self.empty = empty
        self.config = config
        self.device = device

    def __call__(
        self, batch: MicroBatch, step: int, generator: torch.Generator, backward: Backward
    ) -> Tensor:
        size = len(batch.prompts)
        x0 = self.codec.encode(self.pictures(batch.prompts, generator))
        noise = torch.randn(x0.shape, generator=generator)
        logit = torch.randn(size, generator=generator)
        sigma = torch.sigmoid(self.config.logit_mean + self.config.logit_std * logit)
        dropped = torch.rand(size, generator=generator) < self.config.prompt_dropout
        weight = sigma.view(-1, *[1] * (x0.ndim - 1))
        x = (1 - weight) * x0 + weight * noise
        cond = conditioning(batch, self.device).where(~dropped.to(self.device), self.empty)
        velocity = self.backbone(x.to(self.device), sigma.to(self.device), cond)
        loss = (velocity - (noise - x0).to(self.device)).square().mean()
        backward(loss, True)
        return loss.detach()
