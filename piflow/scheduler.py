"""The flow-map step as a diffusers scheduler, so that pipelines can save, load and swap it.

Source: arXiv 2510.14974, section 3. Where an ordinary scheduler's `step` takes the network's
velocity, this one takes the policy that the student's one evaluation stands for; or, inside a
pipeline of `piflow.inference`, the raw tokens that such a policy is read from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from piflow.flow import noised
from piflow.policies.base import Policy, per_sample, working_dtype
from piflow.sampling import Generators, Temperature, follow
from piflow.schedule import FewStep, FlowSchedule, Rounding


@dataclass
class FlowMapSchedulerOutput(BaseOutput):
    """`prev_sample`: the sample at the step's end, in the dtype of the one that came.

    With `FlowMapScheduler.reading(..., in_float32=True)` it is in float32 but after the last step.
    """

    prev_sample: Tensor


class TokenReader(Protocol):
    """How a pipeline's samples and its student's raw outputs are to be read."""

    def latents(self, sample: Tensor) -> Tensor:
        """What the pipeline's loop carries -> latents (B, C, ...)."""
        ...

    def sample(self, latents: Tensor) -> Tensor:
        """The inverse of `latents`."""
        ...

    def policy(self, tokens: Tensor, latents: Tensor, sigma: Tensor) -> Policy:
        """The policy that the student's output at (latents, sigma (B,)) stands for."""
        ...


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """Few-step sampling along policies, deterministic or stochastic.

    It stands in for a family's own scheduler: noise levels come from the student's segments and
    shift, never from the caller.

    Args:
        num_train_timesteps: networks see timestep = sigma * num_train_timesteps.
        shift: time shift s of the noise schedule.
        final_step_size_scale: size of the last segment relative to the others, in (0, 1].
        total_substeps: policy substeps over tau in [0, 1].
        temperature: of GM policies at all steps but the last; "auto" = clip(0.1 (nfe - 1), 0, 1).
        h: stochasticity; 0 is deterministic, "inf" re-noises fully (JSON has no infinity).
        use_dynamic_shifting: take log s linear in the sequence length instead of `shift`; not for
            DX students, whose policies keep the shift of their training.
        base_image_seq_len, max_image_seq_len, base_shift, max_shift: that line's anchors (log s).
        substep_rounding: of a segment's share of the substeps: "nearest" or "up".

    Raises:
        ValueError: h < 0, a temperature < 0, or sizes that `piflow.schedule` refuses.
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
        substep_rounding: Rounding = "nearest",
    ) -> None:
        if not float(h) >= 0:
            raise ValueError(f'FlowMapScheduler: expected h >= 0 or "inf", got {h!r}')
        if temperature != "auto" and not float(temperature) >= 0:
            raise ValueError(
                f'FlowMapScheduler: expected a temperature >= 0 or "auto", got {temperature!r}'
            )
        FewStep(
            1, final_step_size_scale, shift, total_substeps, substep_rounding
        )  # refuses bad ones
        self.init_noise_sigma = 1.0
        self.few_step: FewStep | None = None  # until the number of evaluations is set
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._step_index: int | None = None
        self._reader: TokenReader | None = None
        self._generator: Generators | None = None
        self._in_float32 = False
        self._loop_dtype: torch.dtype | None = None  # of the latents that a pipeline's loop drew

    @property
    def step_index(self) -> int | None:
        """Which step comes next, after `set_begin_index`; None: it is found by its timestep."""
        return self._step_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out one segment a network evaluation.

        Args:
            num_inference_steps: network evaluations N.
            device: where `timesteps` and `sigmas` go.
            sequence_length: image tokens of a sample; with use_dynamic_shifting it or `mu` is
                needed.
            sigmas: what diffusers' pipelines pass in place of N; only their number counts.
            mu: log s as diffusers' pipelines compute it from the sequence length and this
                scheduler's config; used with use_dynamic_shifting only.

        Raises:
            ValueError: N < 1, N missing or another than the number of sigmas, or dynamic shifting
                with neither a sequence length nor mu.
        """
        nfe = _evaluations(num_inference_steps, sigmas)
        self.few_step = replace(self.few_step_of(nfe), shift=self._shift(sequence_length, mu))
        levels = [
            self.few_step.schedule.sigma(segment.tau_src) for segment in self.few_step.segments
        ]
        self.sigmas = torch.tensor([*levels, 0.0], device=device)
        self.timesteps = self.sigmas[:-1] * self.config["num_train_timesteps"]
        self._step_index = None

    def few_step_of(self, nfe: int) -> FewStep:
        """The schedule of `nfe` evaluations at the config's own shift."""
        return FewStep(
            nfe,
            self.config["final_step_size_scale"],
            self.config["shift"],
            self.config["total_substeps"],
            self.config["substep_rounding"],
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Counts steps from `begin_index` on, instead of finding each timestep among `timesteps`.

        That spares a wait for the device at each step; steps must then be taken in order.
        """
        self._step_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Samples as the network wants them: unchanged."""
        return sample

    @contextmanager
    def reading(
        self,
        reader: TokenReader,
        generator: Generators | None = None,
        *,
        in_float32: bool = False,
    ) -> Iterator[None]:
        """Lets `step` take raw tokens inside the context, for loops that know nothing of policies.

        Args:
            reader: the layout of the loop's samples, and the student's policy.
            generator: source of the noise of stochastic sampling for steps without their own.
            in_float32: whether the loop gets float32 latents between the first step and the last:
                a few steps that each round to bfloat16 lose more than the network's own rounding.
        """
        self._reader, self._generator, self._in_float32 = reader, generator, in_float32
        try:
            yield
        finally:
            self._reader, self._generator, self._loop_dtype = None, None, None
            self._in_float32 = False

    def step(
        self,
        model_output: Policy | Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> FlowMapSchedulerOutput | tuple[Tensor]:
        """Roll `sample` along the policy to the next timestep, and re-noise if h > 0.

        Everything between is computed in float32 (float64 if `sample` is).

        Args:
            model_output: the student's policy at (sample, sigma); inside `reading`, its tokens.
            timestep: one of `timesteps`.
            sample: latents (B, C, H, W) or (B, C, T, H, W); inside `reading`, the loop's own.
            generator: source of the noise of stochastic sampling; one, or one a sample.
            return_dict: an output object, or a tuple of one.

        Raises:
            ValueError: `timestep` isn't one of `timesteps`, `set_timesteps` wasn't called, or
                tokens came outside `reading`.
        """
        if self.few_step is None:
            raise ValueError("FlowMapScheduler: call set_timesteps(nfe) before step")
        index = self._next_index(timestep, self.few_step.nfe)
        latents = sample.to(working_dtype(sample))
        if isinstance(model_output, Tensor):
            previous = self._step_tokens(model_output, latents, self.few_step, index, generator)
        else:
            previous = self._follow(model_output, latents, self.few_step, index, generator)
        if not self._in_float32:
            previous = previous.to(sample.dtype)
        else:
            self._loop_dtype = self._loop_dtype or sample.dtype
            if index + 1 == self.few_step.nfe:
                previous = previous.to(self._loop_dtype)
        return FlowMapSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise at `timestep` (B,)."""
        sigma = per_sample(timestep / self.config["num_train_timesteps"], sample, "timestep")
        return noised(sample, noise, sigma).to(sample.dtype)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def _step_tokens(
        self,
        tokens: Tensor,
        sample: Tensor,
        few_step: FewStep,
        index: int,
        generator: Generators | None,
    ) -> Tensor:
        """One step from the student's raw output, in the pipeline's layout."""
        if self._reader is None:
            raise ValueError(
                "FlowMapScheduler: expected a policy, got a tensor: a velocity is not enough for "
                "this scheduler. Call the student through a pipeline of piflow.inference, or make "
                "the policy yourself (piflow.roles.trio.Trio.student)"
            )
        latents = self._reader.latents(sample)
        level = few_step.schedule.sigma(few_step.segments[index].tau_src)
        sigma = torch.full((len(latents),), level, device=latents.device)
        policy = self._reader.policy(tokens, latents, sigma)
        source = generator if generator is not None else self._generator
        return self._reader.sample(self._follow(policy, latents, few_step, index, source))

    def _follow(
        self,
        policy: Policy,
        latents: Tensor,
        few_step: FewStep,
        index: int,
        generator: Generators | None,
    ) -> Tensor:
        """One segment along the policy, at the configured temperature and stochasticity."""
        return follow(
            policy,
            latents,
            few_step,
            index,
            temperature=self.config["temperature"],
            h=float(self.config["h"]),
            generator=generator,
        )

    def _shift(self, sequence_length: int | None, mu: float | None) -> float:
        """The time shift: the config's, or a dynamic one."""
        if not self.config["use_dynamic_shifting"]:
            shift: float = self.config["shift"]
            return shift
        if mu is not None:
            return math.exp(mu)
        if sequence_length is None:
            raise ValueError("use_dynamic_shifting needs set_timesteps(..., sequence_length=)")
        return FlowSchedule.for_sequence_length(
            sequence_length,
            self.config["base_image_seq_len"],
            self.config["max_image_seq_len"],
            self.config["base_shift"],
            self.config["max_shift"],
        ).shift

    def _next_index(self, timestep: float | Tensor, nfe: int) -> int:
        """Which segment this step is; counted after `set_begin_index`, else looked up."""
        if self._step_index is None:
            return self._index(float(timestep))
        if self._step_index >= nfe:
            raise ValueError(
                f"FlowMapScheduler: all {nfe} steps were taken: call "
                "set_timesteps(nfe) for the next sample"
            )
        self._step_index += 1
        return self._step_index - 1

    def _index(self, timestep: float) -> int:
        gaps = (self.timesteps - timestep).abs()
        index = int(gaps.argmin())
        if gaps[index] > 1e-3 * self.config["num_train_timesteps"]:
            raise ValueError(
                f"FlowMapScheduler: expected one of the timesteps {self.timesteps.tolist()}, "
                f"got {timestep}"
            )
        return index


def _evaluations(num_inference_steps: int | None, sigmas: Sequence[float] | None) -> int:
    """N, from itself or from the number of sigmas."""
    if sigmas is None:
        if num_inference_steps is None:
            raise ValueError("set_timesteps needs num_inference_steps, or sigmas to count")
        return num_inference_steps
    if num_inference_steps not in (None, len(sigmas)):
        raise ValueError(
            f"set_timesteps: {num_inference_steps} steps but {len(sigmas)} sigmas; give one of them"
        )
    return len(sigmas)
