"""Training objectives on one micro-batch: π-ID distillation and flow-matching pre-training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from piflow.backbones.base import Backbone, Conditioning
from piflow.backbones.codec import Codec
from piflow.config import FlowMatchingConfig, GMFlowPolicyConfig, PiIDConfig, Recipe
from piflow.data.batch import MicroBatch, conditioning, cut_for
from piflow.flow import draw_noise, noised
from piflow.imitation import (
    ImitationSettings,
    PartOfLoss,
    run_data_dependent,
    run_data_free,
    teacher_ratio,
)
from piflow.policies.base import Policy, to_device
from piflow.roles.fp8 import velocity_error
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.schedule import FewStep
from piflow.sharding.everyone import sum_over_workers
from piflow.training.step import micro_batch_generator

Pictures = Callable[[Sequence[str], torch.Generator], Tensor]
"""(m prompts, generator) -> their pictures (m, 3, H, W) in [-1, 1]."""
CleanLatents = Callable[[MicroBatch, torch.Generator], Tensor]
"""(micro-batch, generator) -> clean latents x0 of its pictures (m, C, h, w), on any device."""


class PiIDObjective:
    """π-ID (arXiv 2510.14974, section 4).

    Data-free: all segments of a trajectory from noise. Data-dependent: for each sample one random
    segment, from its noised picture.

    Args:
        trio: teacher and student over one backbone.
        codec: between pictures and latents.
        negative: conditioning of the negative prompt, one or a batch of them, for classifier-free
            guidance.
        recipe: objective, guidance, policy and picture size are used.
        device: where the trio is.
        clean: needed if `recipe.objective.data` is "dependent", and only then.

    Raises:
        ValueError: another objective, or pictures missing or given where they aren't used.
    """

    def __init__(
        self,
        trio: Trio,
        codec: Codec,
        negative: Conditioning,
        recipe: Recipe,
        device: torch.device,
        clean: CleanLatents | None = None,
    ) -> None:
        self.config = recipe.distillation()
        if (self.config.data == "dependent") != (clean is not None):
            raise ValueError(
                f"objective.data = {self.config.data} needs "
                f"{'a' if clean is None else 'no'} source of pictures, got "
                f"{'none' if clean is None else 'one'}; pictures go with data = dependent"
            )
        self.trio = trio
        self.codec = codec
        self.negative = negative
        self.guidance = recipe.guidance
        # components are dropped from mixtures only
        policy = recipe.policy
        self.dropout = policy.dropout if isinstance(policy, GMFlowPolicyConfig) else 0.0
        self.device = device
        self.seed = recipe.seed
        self.shared_by = cut_for(recipe)
        self.clean = clean
        self.few_step = FewStep.of(self.config)

    def losses(
        self, batch: MicroBatch, step: int, generator: torch.Generator
    ) -> Iterator[PartOfLoss]:
        """Data-free: a part a segment, weighted by its size. Data-dependent: one part."""
        cond = conditioning(batch, self.device, shared_by=self.shared_by)
        teacher = GuidedTeacher(self.trio, cond, self.negative, self.guidance)
        settings = self.settings(step)

        def student(x: Tensor, sigma: Tensor) -> Policy:
            return self.trio.student(x, sigma, cond)

        if self.clean is None:
            noise = self._noise(batch, generator)
            return run_data_free(
                student, teacher, noise, self.few_step, settings, generator=generator
            )
        x0 = to_device(self.clean(batch, generator), self.device)
        noise = draw_noise(x0.shape, generator, self.device)
        return run_data_dependent(
            student, teacher, x0, noise, self.few_step, settings, generator=generator
        )

    def teacher_error(self, batch: MicroBatch, step: int) -> float:
        """Relative L2 error of the fp8 teacher's guided velocity, over all workers' batches.

        Measured along the exact teacher's own Euler steps from noise, one a segment. A collective.

        Args:
            batch: this worker's prompts.
            step: the noise is that of optimiser step `step`.
        """
        generator = micro_batch_generator(self.seed, step, batch.index)
        cond = conditioning(batch, self.device, shared_by=self.shared_by)
        teacher = GuidedTeacher(self.trio, cond, self.negative, self.guidance)

        def exact(x: Tensor, sigma: Tensor) -> Tensor:
            with self.trio.exact_teacher():
                return teacher(x, sigma)

        schedule = self.few_step.schedule
        levels = [schedule.sigma(segment.tau_src) for segment in self.few_step.segments]
        sums = velocity_error(teacher, exact, self._noise(batch, generator), [*levels, 0.0])
        off, length = sum_over_workers(sums).tolist()
        return math.sqrt(off / length)

    def settings(self, step: int) -> ImitationSettings:
        """What optimiser step `step` imitates with; lambda falls along the run."""
        return ImitationSettings(
            num_states=self.config.num_intermediate_states,
            window_substeps=self.config.window_substeps,
            teacher_ratio=teacher_ratio(step, self.config.num_decay_iters),
            dropout=self.dropout,
            scale=self.config.loss_scale,
        )

    def _noise(self, batch: MicroBatch, generator: torch.Generator) -> Tensor:
        """Where the batch's samples start: latents at sigma = 1."""
        shape = self.codec.latent_shape(batch.height, batch.width)
        return draw_noise((len(batch.prompts), *shape), generator, self.device)


def training_flops(forward: int, recipe: Recipe) -> int:
    """Operations of training on one sample, from those of one forward pass of the backbone.

    A backward pass costs a forward pass for the activations' gradients and, unless the base is
    frozen, one more for the weights'. What gradient checkpointing computes again isn't counted, so
    that the figure compares runs; nor are LoRA, the policy's head and its rollouts.
    """
    trained = 2 if recipe.lora is not None else 3
    objective = recipe.objective
    if not isinstance(objective, PiIDConfig):
        return 3 * forward  # all weights, always
    guided = 1 if recipe.guidance.scale == 1.0 else 2
    teacher = objective.num_intermediate_states * guided
    return (objective.nfe if objective.data == "free" else 1) * (trained + teacher) * forward


class FlowMatchingObjective:
    """Flow matching: predict u = ε - x0 at a random noise level, mean squared error.

    Args:
        backbone: the model being trained.
        clean: where latents of the prompts' pictures come from.
        empty: conditioning of the empty prompt, batch of 1, put in for `prompt_dropout` of them.
        config: noise levels and prompt dropout.
        device: where the backbone is.
    """

    def __init__(
        self,
        backbone: Backbone,
        clean: CleanLatents,
        empty: Conditioning,
        config: FlowMatchingConfig,
        device: torch.device,
    ) -> None:
        self.backbone = backbone
        self.clean = clean
        self.empty = empty
        self.config = config
        self.device = device

    def losses(
        self, batch: MicroBatch, step: int, generator: torch.Generator
    ) -> Iterator[PartOfLoss]:
        """One part: mean |u - (ε - x0)|² at x_sigma, sigma = sigmoid(normal)."""
        size = len(batch.prompts)
        x0 = to_device(self.clean(batch, generator), self.device)
        noise = draw_noise(x0.shape, generator, self.device)
        logit = torch.randn(size, generator=generator)
        sigma = torch.sigmoid(self.config.logit_mean + self.config.logit_std * logit)
        dropped = torch.rand(size, generator=generator) < self.config.prompt_dropout
        sigma = to_device(sigma, self.device)
        cond = conditioning(batch, self.device).where(to_device(~dropped, self.device), self.empty)
        velocity = self.backbone(noised(x0, noise, sigma), sigma, cond)
        yield (velocity - (noise - x0)).square().mean(), True


def drawn_latents(codec: Codec, pictures: Pictures, device: torch.device) -> CleanLatents:
    """Clean latents of pictures that are drawn for each micro-batch, encoded on the device.

    The result raises a ValueError if the pictures are not of the micro-batch's size.
    """

    def clean(batch: MicroBatch, generator: torch.Generator) -> Tensor:
        drawn = pictures(batch.prompts, generator)
        expected = (len(batch.prompts), 3, batch.height, batch.width)
        if drawn.shape != expected:
            raise ValueError(
                f"the source of pictures returned {tuple(drawn.shape)} for {expected[0]} prompts "
                f"of {batch.height}x{batch.width} pixels, expected {expected}"
            )
        return codec.encode(to_device(drawn, device))

    return clean


def stored_latents(batch: MicroBatch, generator: torch.Generator) -> Tensor:
    """Clean latents as the embedding store holds them; a `CleanLatents` that draws nothing.

    Raises:
        ValueError: the micro-batch brings none.
    """
    latents = batch.latents if batch.there is None else batch.there.take().latents
    if latents is None:
        raise ValueError(
            "the training stream brought no latents, which objective.pictures = store trains on; "
            "open it with them"
        )
    return latents
