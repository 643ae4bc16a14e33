"""Training objectives on one micro-batch: π-ID distillation and flow-matching pre-training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from piflow.backbones.base import Backbone, Conditioning
from piflow.backbones.codec import Codec
from piflow.config import FlowMatchingConfig, GMFlowPolicyConfig, PiIDConfig, Recipe
from piflow.data.batch import MicroBatch, conditioning
from piflow.imitation import ImitationSettings, run_data_dependent, run_data_free, teacher_ratio
from piflow.policies.base import Policy, expand_as_latents
from piflow.roles.fp8 import velocity_error
from piflow.roles.guided import GuidedTeacher
from piflow.roles.trio import Trio
from piflow.schedule import FlowSchedule, segments
from piflow.training.step import Backward, micro_batch_generator

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
        if not isinstance(recipe.objective, PiIDConfig):
            raise ValueError(f"expected objective.type pi_id, got {recipe.objective.type}")
        if (recipe.objective.data == "dependent") != (clean is not None):
            raise ValueError(
                f"objective.data = {recipe.objective.data} needs "
                f"{'a' if clean is None else 'no'} source of pictures, got "
                f"{'none' if clean is None else 'one'}; pictures go with data = dependent"
            )
        self.trio = trio
        self.codec = codec
        self.negative = negative
        self.config = recipe.objective
        self.guidance = recipe.guidance
        # components are dropped from mixtures only
        policy = recipe.policy
        self.dropout = policy.dropout if isinstance(policy, GMFlowPolicyConfig) else 0.0
        self.device = device
        self.seed = recipe.seed
        self.clean = clean
        self.schedule = FlowSchedule(self.config.shift)
        self.segments = segments(self.config.nfe, self.config.final_step_size_scale)

    def __call__(
        self, batch: MicroBatch, step: int, generator: torch.Generator, backward: Backward
    ) -> Tensor:
        cond = conditioning(batch, self.device)
        total = torch.zeros((), device=self.device, dtype=torch.float64)

        def student(x: Tensor, sigma: Tensor) -> Policy:
            return self.trio.student(x, sigma, cond)

        def add_up(loss: Tensor, last: bool) -> None:
            total.add_(loss.detach())
            backward(loss, last)

        teacher = GuidedTeacher(self.trio, cond, self.negative, self.guidance)
        settings = self.settings(step)
        if self.clean is None:
            shape = self.codec.latent_shape(batch.height, batch.width)
            noise = torch.randn((len(batch.prompts), *shape), generator=generator).to(self.device)
            run_data_free(
                student, teacher, noise, self.schedule, self.segments, settings,
                generator=generator, backward=add_up,
            )  # fmt: skip
        else:
            x0 = self.clean(batch, generator).to(self.device)
            noise = torch.randn(x0.shape, generator=generator).to(self.device)
            run_data_dependent(
                student, teacher, x0, noise, self.schedule, self.segments, settings,
                generator=generator, backward=add_up,
            )  # fmt: skip
        return total

    def teacher_error(self, batch: MicroBatch, step: int) -> float:
        """Relative L2 error of the fp8 teacher's guided velocity, over all workers' batches.

        Measured along the exact teacher's own Euler steps from noise, one a segment. A collective.

        Args:
            batch: this worker's prompts.
            step: the noise is that of optimiser step `step`.
        """
        generator = micro_batch_generator(self.seed, step, batch.index)
        cond = conditioning(batch, self.device)
        teacher = GuidedTeacher(self.trio, cond, self.negative, self.guidance)

        def exact(x: Tensor, sigma: Tensor) -> Tensor:
            with self.trio.exact_teacher():
                return teacher(x, sigma)

        shape = self.codec.latent_shape(batch.height, batch.width)
        noise = torch.randn((len(batch.prompts), *shape), generator=generator).to(self.device)
        ends = [self.schedule.sigma(segment.tau_src) for segment in self.segments]
        sums = velocity_error(teacher, exact, noise, [*ends, 0.0])
        if dist.is_initialized():
            dist.all_reduce(sums)
        off, length = sums.tolist()
        return math.sqrt(off / length)

    def settings(self, step: int) -> ImitationSettings:
        """What optimiser step `step` imitates with; lambda falls along the run."""
        return ImitationSettings(
            num_states=self.config.num_intermediate_states,
            window_substeps=self.config.window_substeps,
            teacher_ratio=teacher_ratio(step, self.config.num_decay_iters),
            dropout=self.dropout,
            total_substeps=self.config.total_substeps,
            scale=self.config.loss_scale,
        )


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

    def __call__(
        self, batch: MicroBatch, step: int, generator: torch.Generator, backward: Backward
    ) -> Tensor:
        size = len(batch.prompts)
        x0 = self.clean(batch, generator).to(self.device)
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        logit = torch.randn(size, generator=generator)
        sigma = torch.sigmoid(self.config.logit_mean + self.config.logit_std * logit)
        dropped = torch.rand(size, generator=generator) < self.config.prompt_dropout
        sigma = sigma.to(self.device)
        weight = expand_as_latents(sigma, x0)
        x = (1 - weight) * x0 + weight * noise
        cond = conditioning(batch, self.device).where(~dropped.to(self.device), self.empty)
        velocity = self.backbone(x, sigma, cond)
        loss = (velocity - (noise - x0)).square().mean()
        backward(loss, True)
        return loss.detach()


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
        return codec.encode(drawn.to(device))

    return clean


def stored_latents(batch: MicroBatch, generator: torch.Generator) -> Tensor:
    """Clean latents as the embedding store holds them; a `CleanLatents` that draws nothing.

    Raises:
        ValueError: the micro-batch brings none.
    """
    if batch.latents is None:
        raise ValueError(
            "the training stream brought no latents, which objective.pictures = store trains on; "
            "open it with them"
        )
    return batch.latents
