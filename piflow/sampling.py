"""Sampling: a student in a few network evaluations, and the teacher's Euler reference.

Source: arXiv 2510.14974, sections 3 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from piflow.flow import Student, Velocity
from piflow.policies.base import Policy, working_dtype
from piflow.policies.gmflow import GMFlowPolicy, auto_temperature
from piflow.policies.rollout import rollout
from piflow.schedule import FewStep, FlowSchedule

Temperature = float | Literal["auto"]
Generators = torch.Generator | Sequence[torch.Generator]  # one for the batch, or one a sample


@dataclass(frozen=True)
class FlowMapStep:
    """One step of the stochastic flow map: roll to sigma_dst, then x <- keep x_dst + noise eps."""

    sigma_dst: float
    keep: float
    noise: float


def flow_map_step(sigma_src: float, sigma_to: float, h: float) -> FlowMapStep:
    """How to go from sigma_src to sigma_to with stochasticity h.

    With alpha = 1 - sigma and m = (sigma_to alpha_src / (sigma_src alpha_to))^(h^2): roll to
    sigma_dst = sigma_to m / (alpha_to + sigma_to m), scale by alpha_to + sigma_to m, add
    sigma_to sqrt(1 - m^2) of noise.

    Args:
        sigma_src, sigma_to: noise levels, 1 >= sigma_src > sigma_to >= 0.
        h: >= 0; 0 is deterministic, math.inf re-noises fully.

    Raises:
        ValueError: h negative or not a number, or levels out of order.
    """
    if not h >= 0:
        raise ValueError(f"expected h >= 0 (0 = deterministic, inf = full re-noising), got {h}")
    if not 1 >= sigma_src > sigma_to >= 0:
        raise ValueError(f"expected 1 >= sigma_src > sigma_to >= 0, got {sigma_src}, {sigma_to}")
    if h == 0:
        return FlowMapStep(sigma_to, 1.0, 0.0)  # m = 1, less the rounding of alpha_to + sigma_to
    alpha_src, alpha_to = 1 - sigma_src, 1 - sigma_to
    m = (sigma_to * alpha_src / (sigma_src * alpha_to)) ** (h * h)
    keep = alpha_to + sigma_to * m
    return FlowMapStep(sigma_to * m / keep, keep, sigma_to * math.sqrt(1 - m * m))


def check_nfe(nfe: int, trained: int, *, elastic: bool) -> str:
    """Whether a student runs at a number of network evaluations that it wasn't trained for.

    A Gaussian mixture is defined along the whole of time, a DX policy down to one segment of the
    trained length. So GM students run at any number, DX students at no fewer than trained.

    Args:
        nfe: evaluations asked for.
        trained: evaluations of its training.
        elastic: whether its policy is a GM; else DX.

    Returns:
        A caution for whoever asked; empty for the trained number.

    Raises:
        ValueError: fewer than trained without `elastic`.
    """
    if nfe < trained and not elastic:
        raise ValueError(
            f"this student was trained for {trained} network evaluations and runs at {trained} or "
            f"more, since its policy (DX) ends after one of {trained} segments, got {nfe}; distil "
            f"another for {nfe}"
        )
    if nfe == trained:
        return ""
    asked = f"this student was trained for {trained} network evaluations and runs at {nfe}"
    if nfe < trained:
        return f"{asked}, in longer steps than it has learnt: expect worse pictures"
    return f"{asked}, whose steps start where it never did: compare with {trained}"


@torch.no_grad()
def sample_few_step(
    student: Student,
    noise: Tensor,
    few_step: FewStep,
    *,
    temperature: Temperature = "auto",
    h: float = 0.0,
    generator: Generators | None = None,
) -> Tensor:
    """Sample x0 with one network evaluation a segment: student -> policy -> rollout.

    Args:
        student: called once a segment, without gradient.
        noise: (B, C, H, W) or (B, C, T, H, W) at sigma = 1.
        few_step: the schedule; GM students run at any nfe from the trained one up.
        temperature, h, generator: as in `follow`.

    Returns:
        x0, float32 (float64 if `noise` is).

    Raises:
        ValueError: as `follow`.
    """
    x = noise.to(working_dtype(noise))
    for index, segment in enumerate(few_step.segments):
        sigma = torch.full((len(x),), few_step.schedule.sigma(segment.tau_src), device=x.device)
        policy = student(x, sigma)
        x = follow(policy, x, few_step, index, temperature=temperature, h=h, generator=generator)
    return x


def follow(
    policy: Policy,
    x: Tensor,
    few_step: FewStep,
    index: int,
    *,
    temperature: Temperature = "auto",
    h: float = 0.0,
    generator: Generators | None = None,
) -> Tensor:
    """One step of the sampler: roll `x` along `policy` over a segment, re-noise if h > 0.

    Args:
        policy: the student's at (x, the segment's start).
        x: (B, C, H, W) or (B, C, T, H, W).
        few_step: the schedule.
        index: of the segment, from 0.
        temperature: of GM policies, at all steps but the last; "auto" = clip(0.1 (nfe - 1), 0, 1).
            Other policies have none: "auto" and 1 leave them as they are.
        h: stochasticity; 0 is deterministic, math.inf re-noises fully.
        generator: source of the noise of stochastic sampling, drawn on its device; or one a
            sample, so that a sample doesn't depend on the others.

    Returns:
        As `x`, at the segment's end.

    Raises:
        ValueError: a temperature for a policy that has none, h < 0, or a number of generators that
            isn't the batch's.
    """
    segment, schedule = few_step.segments[index], few_step.schedule
    if index < few_step.nfe - 1:
        policy = with_temperature(policy, temperature, few_step.nfe)
    if h == 0:
        return _roll(policy, x, segment.tau_src, segment.tau_dst, few_step)
    step = flow_map_step(schedule.sigma(segment.tau_src), schedule.sigma(segment.tau_dst), h)
    tau_dst = schedule.tau(step.sigma_dst)
    x = _roll(policy, x, segment.tau_src, tau_dst, few_step)
    if step.noise == 0:
        return step.keep * x
    return step.keep * x + step.noise * _normal_like(x, generator)


def with_temperature(policy: Policy, temperature: Temperature, nfe: int) -> Policy:
    """The policy at a sampling temperature, "auto" resolved for `nfe` evaluations.

    Raises:
        ValueError: a temperature other than "auto" or 1 for a policy that isn't a GMFlowPolicy.
    """
    if isinstance(policy, GMFlowPolicy):
        return policy.temperature(
            auto_temperature(nfe) if temperature == "auto" else float(temperature)
        )
    if temperature not in ("auto", 1):
        raise ValueError(
            f"expected a GMFlowPolicy for temperature {temperature}, got {type(policy).__name__}; "
            'use "auto" or 1'
        )
    return policy


@torch.no_grad()
def sample_euler(velocity: Velocity, noise: Tensor, schedule: FlowSchedule, steps: int) -> Tensor:
    """Integrate a velocity field from noise to x0 in `steps` Euler steps uniform in raw time.

    Args:
        velocity: the field, such as a guided teacher.
        noise: (B, C, H, W) or (B, C, T, H, W) at sigma = 1.
        schedule: raw time -> sigma.
        steps: at least 1.

    Returns:
        x0, float32 (float64 if `noise` is).

    Raises:
        ValueError: `steps` < 1.
    """
    if steps < 1:
        raise ValueError(f"sample_euler: expected steps >= 1, got {steps}")
    x = noise.to(working_dtype(noise))
    sigmas = [schedule.sigma(1 - i / steps) for i in range(steps + 1)]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        u = velocity(x, torch.full((len(x),), sigma, device=x.device))
        x = x + (following - sigma) * u.to(x.dtype)
    return x


def _normal_like(x: Tensor, generator: Generators | None) -> Tensor:
    """Standard normal numbers shaped as `x`, from one generator or one a sample."""
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]  # as diffusers: of the whole batch
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(
                f"expected one generator, or one for each of the {len(x)} samples, got "
                f"{len(generator)}"
            )
        return torch.cat([_normal_like(x[i : i + 1], part) for i, part in enumerate(generator)])
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _roll(policy: Policy, x: Tensor, tau_from: float, tau_to: float, few_step: FewStep) -> Tensor:
    dtype = working_dtype(x)
    start, stop = (torch.full((len(x),), tau, dtype=dtype) for tau in (tau_from, tau_to))
    substeps, rounding = few_step.total_substeps, few_step.substep_rounding
    return rollout(policy, x, start, stop, few_step.schedule, substeps, rounding)
