"""The DX policy: x0 as a given function of time, on a grid or as a polynomial.

Source: arXiv 2510.14974, section 3. The field is u = (x - x0(tau)) / sigma. `velocity_polynomial`
is piflow's own: no other project's loader knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from piflow.policies.base import SIGMA_MIN, expand_as_latents, per_sample, working_dtype
from piflow.schedule import FlowSchedule

Mode = Literal["grid", "polynomial", "velocity_polynomial"]


class DXPolicy:
    """A student's output as x0(tau) over the segment that starts at sigma_src.

    Args:
        values: (B, N_g, C, H, W) or (B, N_g, C, T, H, W), velocity space. *grid*: velocities
            whose x0 values sit at N_g raw times spaced uniformly from the segment's end (first) to
            its start (last). *polynomial*, as published: with d = tau_src - tau,
            x0(tau) = sum_i d^i (x_src - sigma_src values_i). *velocity_polynomial*:
            x0(tau) = x_src - sigma_src sum_i d^i values_i, so that zeros beyond the first value are
            the teacher's velocity, held for the segment.
        x_src: (B, C, H, W) or (B, C, T, H, W), the latents that the student saw.
        sigma_src: (B,), their noise level.
        segment_size: length of a segment in raw time as trained, kept at inference; a segment
            never reaches below tau = 0.
        shift: the time shift as trained.
        mode: "grid" (values are interpolated linearly, constant outside), or a polynomial.

    Everything is computed in float32, or in float64 if any input is float64.

    Raises:
        ValueError: shapes don't fit together, or an unknown mode.
    """

    def __init__(
        self,
        values: Tensor,
        x_src: Tensor,
        sigma_src: Tensor,
        segment_size: float,
        shift: float,
        mode: Mode = "grid",
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"DXPolicy: expected mode {' or '.join(get_args(Mode))}, got {mode!r}")
        if not 0 < segment_size <= 1:
            raise ValueError(f"DXPolicy: expected segment_size in (0, 1], got {segment_size}")
        _check_shapes(values, x_src)
        dtype = working_dtype(values, x_src)
        self.mode: Mode = mode
        self.segment_size = segment_size
        self.schedule = FlowSchedule(shift)
        self._x_src = x_src.to(dtype)
        self._sigma_src = per_sample(sigma_src, self._x_src, "sigma_src")
        self._values = values.to(dtype)

    def denoised(self, sigma: Tensor) -> Tensor:
        """x0(tau) at noise levels `sigma` (B,), as x_src."""
        tau = self.schedule.tau(per_sample(sigma, self._x_src, "sigma"))
        tau_src = self.schedule.tau(self._sigma_src)
        sigma_src = expand_as_latents(self._sigma_src, self._x_src)
        if self.mode == "grid":
            return self._x_src - sigma_src * self._interpolate(tau, tau_src)
        step = expand_as_latents(tau_src - tau, self._x_src)
        velocity = _polynomial(self._values.unbind(1), step)
        if self.mode == "velocity_polynomial":
            return self._x_src - sigma_src * velocity
        ones = [torch.ones_like(step)] * self._values.shape[1]
        return _polynomial(ones, step) * self._x_src - sigma_src * velocity

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(x - x0(tau)) / sigma at x (as x_src) and sigma (B,)."""
        if x.shape != self._x_src.shape:
            raise ValueError(
                f"DXPolicy: expected latents {tuple(self._x_src.shape)} as x_src, "
                f"got {tuple(x.shape)}"
            )
        latents = x.to(self._x_src.dtype)
        noise_level = per_sample(sigma, latents, "sigma").clamp(min=SIGMA_MIN)
        return (latents - self.denoised(sigma)) / expand_as_latents(noise_level, latents)

    def detach(self) -> DXPolicy:
        """The same field without gradient."""
        return DXPolicy(
            self._values.detach(),
            self._x_src.detach(),
            self._sigma_src.detach(),
            self.segment_size,
            self.schedule.shift,
            self.mode,
        )

    def _interpolate(self, tau: Tensor, tau_src: Tensor) -> Tensor:
        """The grid at `tau`; interpolating velocities equals interpolating x0 (both affine)."""
        intervals = self._values.shape[1] - 1
        if intervals == 0:
            return self._values[:, 0]
        tau_dst = (tau_src - self.segment_size).clamp(min=0)  # the last segment may be shorter
        length = (tau_src - tau_dst).clamp(min=SIGMA_MIN)
        position = ((tau - tau_dst) / length).clamp(0, 1) * intervals
        lower = (
            position.detach().floor().clamp(max=intervals - 1)
        )  # at the source the last interval
        index = lower.to(torch.int64)
        rows = torch.arange(len(index), device=index.device)
        left, right = self._values[rows, index], self._values[rows, index + 1]
        return torch.lerp(left, right, expand_as_latents(position - lower, left))


def _polynomial(coefficients: Sequence[Tensor], step: Tensor) -> Tensor:
    """sum_i coefficients_i step^i, by Horner's rule."""
    *lower, total = coefficients
    for coefficient in reversed(lower):
        total = total * step + coefficient
    return total


def _check_shapes(values: Tensor, x_src: Tensor) -> None:
    if x_src.ndim not in (4, 5):
        raise ValueError(
            "DXPolicy: expected x_src (B, C, H, W) or (B, C, T, H, W), got "
            f"{tuple(x_src.shape)}; add the missing dimensions"
        )
    points = values.shape[1] if values.ndim > 1 else 0
    expected = (x_src.shape[0], points, *x_src.shape[1:])
    if points < 1 or tuple(values.shape) != expected:
        raise ValueError(
            f"DXPolicy: expected values (B, N_g, ...) = {expected} with N_g >= 1 for x_src "
            f"{tuple(x_src.shape)}, got {tuple(values.shape)}"
        )
