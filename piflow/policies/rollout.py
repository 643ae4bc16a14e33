"""Rollouts: Euler steps along a policy, uniform in raw time, with no network call.

Source: arXiv 2510.14974, section 3. Each sample of a batch takes its own number of substeps; a
sample that is done stays put. The substep tables are made on the host in one go, so the loop never
waits for the device. Pass tau on the CPU: taus on a device cost one synchronisation before the
loop, to learn the largest substep count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.policies.base import (
    Policy,
    expand_as_latents,
    per_sample,
    recomputed,
    to_device,
    working_dtype,
)
from piflow.policies.gmflow import GMFlowPolicy
from piflow.schedule import FlowSchedule, Rounding, num_substeps


@dataclass(frozen=True)
class SubstepTable:
    """Where each substep evaluates the policy and how far it goes, (n_max, B) each.

    A sample that is done is still evaluated, at its starting sigma, and moves by zero.
    """

    sigma: Tensor
    delta: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> SubstepTable:
        """A copy on another device, in one transfer."""
        both = torch.stack([self.sigma, self.delta])
        return SubstepTable(*to_device(both, device, dtype))


def substep_table(
    tau_from: Tensor,
    tau_to: Tensor,
    schedule: FlowSchedule,
    total_substeps: int,
    rounding: Rounding = "nearest",
) -> SubstepTable:
    """Euler substeps from `tau_from` to `tau_to` (B,), on the CPU.

    Raises:
        ValueError: times aren't (B,), leave [0, 1], or run upwards.
    """
    start, stop = _host_times(tau_from, tau_to)
    counts = num_substeps(start - stop, total_substeps, rounding)
    step = torch.arange(int(counts.max()) + 1, dtype=start.dtype)[:, None]
    # Fractions of the way, and not steps added up: the last one ends at tau_to to the last bit.
    fraction = (step / counts).clamp(max=1)
    sigma = schedule.sigma(
        torch.lerp(start.expand_as(fraction), stop.expand_as(fraction), fraction)
    )
    running = step[:-1] < counts
    return SubstepTable(
        torch.where(running, sigma[:-1], sigma[:1]),
        torch.where(running, sigma[1:] - sigma[:-1], 0.0),
    )


def rollout(
    policy: Policy,
    x: Tensor,
    tau_from: Tensor,
    tau_to: Tensor,
    schedule: FlowSchedule,
    total_substeps: int = 128,
    rounding: Rounding = "nearest",
) -> Tensor:
    """Follow `policy` from `tau_from` to `tau_to` in max(1, round((from - to) S)) Euler steps.

    Args:
        policy: the velocity field.
        x: latents at `tau_from`, (B, C, H, W) or (B, C, T, H, W).
        tau_from, tau_to: (B,) raw times in [0, 1], from >= to. On the CPU no synchronisation.
        schedule: raw time -> sigma.
        total_substeps: S, substeps over tau in [0, 1].
        rounding: of an interval's share of them.

    Returns:
        Latents at `tau_to`, float32 (float64 if `x` is). Differentiable in the policy and `x`, not
        in the times. Of a substep, x is kept for the backward pass (by a GMFlowPolicy in plain
        PyTorch also the weights, K numbers a pixel, and by its fused kernel nothing); the rest is
        recomputed.

    Raises:
        ValueError: times aren't (B,), leave [0, 1], or run upwards.
    """
    latents = x.to(working_dtype(x))
    table = substep_table(tau_from, tau_to, schedule, total_substeps, rounding)
    table = table.to(latents.device, latents.dtype)
    if isinstance(policy, GMFlowPolicy):
        return policy.integrate(latents, table.sigma, table.delta)
    for sigma, delta in zip(table.sigma.unbind(0), table.delta.unbind(0), strict=True):
        latents = recomputed(_euler_step, policy, latents, sigma, delta)
    return latents


def mean_velocity(
    policy: Policy,
    x: Tensor,
    tau_from: Tensor,
    tau_to: Tensor,
    schedule: FlowSchedule,
    total_substeps: int = 128,
    rounding: Rounding = "nearest",
) -> Tensor:
    """Mean velocity (x_from - x_to) / (sigma_from - sigma_to) of a rollout.

    Samples whose interval rounds to fewer than two substeps get the velocity at `tau_from`.
    Arguments, errors and differentiability as in `rollout`. Returns velocities shaped as `x`.
    """
    start, stop = _host_times(tau_from, tau_to)
    short = num_substeps(start - stop, total_substeps, rounding) < 2
    latents = x.to(working_dtype(x))
    sigma_from, sigma_to = schedule.sigma(start), schedule.sigma(stop)
    if bool(short.all()):
        return policy.velocity(latents, per_sample(sigma_from, latents, "tau_from"))
    end = rollout(policy, latents, start, stop, schedule, total_substeps, rounding)
    # 1 where the secant isn't taken: 0 / 0 there would be NaN, and stay NaN in `where`'s gradient
    span = per_sample(torch.where(short, 1.0, sigma_from - sigma_to), latents, "tau_from")
    average = (latents - end) / expand_as_latents(span, latents)
    if not bool(short.any()):
        return average
    instantaneous = policy.velocity(latents, per_sample(sigma_from, latents, "tau_from"))
    mask = expand_as_latents(to_device(short, latents.device), latents)
    return torch.where(mask, instantaneous, average)


def _euler_step(policy: Policy, x: Tensor, sigma: Tensor, delta: Tensor) -> Tensor:
    return x + expand_as_latents(delta, x) * policy.velocity(x, sigma)


def _host_times(tau_from: Tensor, tau_to: Tensor) -> tuple[Tensor, Tensor]:
    """Both times on the CPU, checked; rounding errors beyond [0, 1] are cut off."""
    start, stop = tau_from.detach().cpu(), tau_to.detach().cpu()
    if start.ndim != 1 or start.shape != stop.shape:
        raise ValueError(
            f"expected tau_from and tau_to of shape (B,), got {tuple(start.shape)} and "
            f"{tuple(stop.shape)}"
        )
    slack = 1e-5
    inside = (stop >= -slack) & (start <= 1 + slack) & (start >= stop - slack)
    if not bool(inside.all()):
        raise ValueError(
            "expected 1 >= tau_from >= tau_to >= 0 (time runs from noise to data), got tau_from "
            f"{start.tolist()}, tau_to {stop.tolist()}"
        )
    return start.clamp(0, 1), stop.clamp(0, 1)
