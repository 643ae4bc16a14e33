"""The flow-map step as a diffusers scheduler, so that pipelines can save, load and swap it.

Source: arXiv 2510.14974, section 3. Where an ordinary scheduler's `step` takes the network's
velocity, this one takes the policy that the student's one evaluation stands for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from piflow.policies.base import Policy, expand_as_latents, per_sample, working_dtype
from piflow.sampling import Temperature, follow, with_temperature
from piflow.schedule import FlowSchedule, Segment, segments


@dataclass
class FlowMapSchedulerOutput(BaseOutput):
    """`prev_sample`: latents (B, C, ...) at the step's end."""

    prev_sample: Tensor


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """Few-step sampling along policies, deterministic or stochastic.

    Args:
        num_train_timesteps: networks see timestep = sigma * num_train_timesteps.
        shift: time shift s of the noise schedule.
        final_step_size_scale: size of the last segment relative to the others, in (0, 1].
        total_substeps: policy substeps over tau in [0, 1].
        temperature: of GM policies at all steps but the last; "auto" = clip(0.1 (nfe - 1), 0, 1).
        h: stochasticity; 0 is deterministic, "inf" re-noises fully (JSON has no infinity).
        use_dynamic_shifting: take log s linear in the sequence length instead of `shift`.
        base_image_seq_len, max_image_seq_len, base_shift, max_shift: that line's anchors (log s).
    """

    config_name = "scheduler_config.json"  # type: ignore[assignment]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 3.2,
        final_step_size_scale: float = 0.5,
        total_substeps: int = 128,
        temperature: Temperature = "auto",
        h: float | str = 0.0,
        use_dynamic_shifting: bool = False,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> None:
        if not float(h) >= 0:
            raise ValueError(f'FlowMapScheduler: expected h >= 0 or "inf", got {h!r}')
        self.init_noise_sigma = 1.0
        self.schedule = FlowSchedule(shift)
        self.segments: list[Segment] = []
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        sequence_length: int | None = None,
    ) -> None:
        """Lay out `num_inference_steps` segments.

        Args:
            num_inference_steps: network evaluations N.
            device: where `timesteps` and `sigmas` go.
            sequence_length: image tokens of a sample; needed with use_dynamic_shifting.

        Raises:
            ValueError: N < 1, or the sequence length is missing.
        """
        config = self.config
        if config["use_dynamic_shifting"]:
            if sequence_length is None:
                raise ValueError("use_dynamic_shifting needs set_timesteps(..., sequence_length=)")
            self.schedule = FlowSchedule.for_sequence_length(
                sequence_length,
                config["base_image_seq_len"],
                config["max_image_seq_len"],
                config["base_shift"],
                config["max_shift"],
            )
        self.segments = segments(num_inference_steps, config["final_step_size_scale"])
        levels = [self.schedule.sigma(segment.tau_src) for segment in self.segments]
        self.sigmas = torch.tensor([*levels, 0.0], device=device)
        self.timesteps = self.sigmas[:-1] * config["num_train_timesteps"]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Latents as the network wants them: unchanged."""
        return sample

    def step(
        self,
        model_output: Policy,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMapSchedulerOutput | tuple[Tensor]:
        """Roll `sample` along the policy to the next timestep, and re-noise if h > 0.

        Args:
            model_output: the student's policy at (sample, sigma).
            timestep: one of `timesteps`.
            sample: latents (B, C, H, W) or (B, C, T, H, W).
            generator: source of the noise of stochastic sampling.
            return_dict: an output object, or a tuple of one.

        Raises:
            ValueError: `timestep` isn't one of `timesteps`, or `set_timesteps` wasn't called.
        """
        index = self._index(float(timestep))
        policy = model_output
        if index < len(self.segments) - 1:
            policy = with_temperature(policy, self.config["temperature"], len(self.segments))
        latents = sample.to(working_dtype(sample))
        previous = follow(
            policy,
            latents,
            self.segments[index],
            self.schedule,
            self.config["total_substeps"],
            float(self.config["h"]),
            generator,
        )
        return FlowMapSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise at `timestep` (B,)."""
        sigma = per_sample(timestep / self.config["num_train_timesteps"], sample, "timestep")
        return torch.lerp(sample, noise.to(sample.dtype), expand_as_latents(sigma, sample))

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def _index(self, timestep: float) -> int:
        if not self.segments:
            raise ValueError("FlowMapScheduler: call set_timesteps(nfe) before step")
        gaps = (self.timesteps - timestep).abs()
        index = int(gaps.argmin())
        if gaps[index] > 1e-3 * self.config["num_train_timesteps"]:
            raise ValueError(
                f"FlowMapScheduler: expected one of the timesteps {self.timesteps.tolist()}, "
                f"got {timestep}"
            )
        return index
