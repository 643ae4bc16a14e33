"""DX policies: exactness on linear and polynomial x0, clamping, gradients."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from piflow.policies import DXPolicy, rollout
from piflow.policies.dx import Mode
from piflow.schedule import FlowSchedule, segments

F64 = torch.float64
SCHEDULE = FlowSchedule(3.2)
SPACES = [(2, 3), (2, 2, 3)]


def column(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.ndim - 1))


def case(space: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_src, tau_src, and x0(tau) = start + slope tau."""
    generator = torch.Generator().manual_seed(0)
    x, start, slope = torch.randn(3, 2, 3, *space, dtype=F64, generator=generator).unbind(0)
    return x, torch.tensor([1.0, 2.5 / 3.5], dtype=F64), start, slope


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("points", [2, 3, 10])
def test_grid_is_exact_for_linear_x0(space: tuple[int, ...], points: int) -> None:
    x, tau_src, start, slope = case(space)
    size, sigma_src = 1 / 3.5, SCHEDULE.sigma(tau_src)
    taus = torch.stack([tau_src - size + size * i / (points - 1) for i in range(points)], 1)
    truth = [start + slope * column(tau, x) for tau in taus.unbind(1)]
    values = torch.stack([(x - x0) / column(sigma_src, x) for x0 in truth], 1)
    policy = DXPolicy(values, x, sigma_src, size, 3.2)
    for elapsed in (0.0, 0.013, 0.2, 1 / 3.5):
        tau = tau_src - elapsed
        sigma, x0 = SCHEDULE.sigma(tau), start + slope * column(tau, x)
        torch.testing.assert_close(policy.denoised(sigma), x0, rtol=1e-12, atol=1e-12)
        u = policy.velocity(2 * x, sigma)
        torch.testing.assert_close(u, (2 * x - x0) / column(sigma, x), rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(
    points=st.integers(1, 10),
    nfe=st.integers(1, 8),
    scale=st.sampled_from([0.25, 0.5, 1.0]),
    shift=st.floats(0.5, 6),
    space=st.sampled_from([(1, 1), (2, 3), (2, 2, 3)]),
    mode=st.sampled_from(["grid", "velocity_polynomial"]),
    seed=st.integers(0, 1000),
)
def test_straight_teacher_at_any_segment(points, nfe, scale, shift, space, mode, seed) -> None:
    """Values that say one velocity at all times (a polynomial's higher ones zero): the end of each
    segment is x + u (sigma_dst - sigma_src), and from there the same x0 is seen."""
    generator, schedule = torch.Generator().manual_seed(seed), FlowSchedule(shift)
    x, u = torch.randn(2, 1, 3, *space, dtype=F64, generator=generator).unbind(0)
    repeat = torch.ones(points) if mode == "grid" else torch.eye(points)[0]
    values = u.unsqueeze(1) * repeat.double().reshape(1, points, *[1] * (u.ndim - 1))
    for part in segments(nfe, scale):
        tau_src, tau_dst = (torch.full((1,), t, dtype=F64) for t in (part.tau_src, part.tau_dst))
        sigma_src, sigma_dst = schedule.sigma(tau_src), schedule.sigma(tau_dst)
        policy = DXPolicy(values, x, sigma_src, min(1 / (nfe - 1 + scale), 1), shift, mode)
        end = rollout(policy, x, tau_src, tau_dst, schedule, 16)
        torch.testing.assert_close(end, x + column(sigma_dst - sigma_src, x) * u)
        x0 = x - column(sigma_src, x) * u
        torch.testing.assert_close(policy.denoised(sigma_dst), x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("space", SPACES)
def test_polynomial_of_x0_as_published(space: tuple[int, ...]) -> None:
    """x0(tau) = sum_i d^i (x_src - sigma_src values_i): each value is a velocity of its own."""
    x, tau_src, *_ = case(space)
    sigma_src = SCHEDULE.sigma(tau_src)
    coefficients = torch.randn(2, 4, *x.shape[1:], dtype=F64)  # of x0
    values = (x.unsqueeze(1) - coefficients) / column(sigma_src, coefficients)
    policy = DXPolicy(values, x, sigma_src, 1 / 3.5, 3.2, "polynomial")
    for elapsed in (0.0, 0.013, 0.17, 1 / 3.5):
        x0 = sum(coefficients[:, i] * elapsed**i for i in range(4))
        sigma = SCHEDULE.sigma(tau_src - elapsed)
        torch.testing.assert_close(policy.denoised(sigma), x0)
        torch.testing.assert_close(policy.velocity(x, sigma), (x - x0) / column(sigma, x))
    zeros = DXPolicy(0 * values, x, sigma_src, 1 / 3.5, 3.2, "polynomial")
    later = zeros.denoised(SCHEDULE.sigma(tau_src - 0.5))
    torch.testing.assert_close(later, x * (1 + 0.5 + 0.5**2 + 0.5**3))


@pytest.mark.parametrize("space", SPACES)
def test_velocity_polynomial_is_exact_and_starts_at_the_projection(space: tuple[int, ...]) -> None:
    x, tau_src, *_ = case(space)
    sigma_src = SCHEDULE.sigma(tau_src)
    values = torch.randn(2, 4, *x.shape[1:], dtype=F64)
    policy = DXPolicy(values, x, sigma_src, 1 / 3.5, 3.2, "velocity_polynomial")
    step = column(torch.full((2,), 0.17, dtype=F64), x)
    u = sum(values[:, i] * step**i for i in range(4))
    found = policy.denoised(SCHEDULE.sigma(tau_src - 0.17))
    torch.testing.assert_close(found, x - column(sigma_src, x) * u)
    torch.testing.assert_close(policy.velocity(x, sigma_src), values[:, 0])


@pytest.mark.parametrize("mode", ["grid", "velocity_polynomial"])
def test_constant_velocity_goes_straight_in_any_number_of_substeps(mode: str) -> None:
    x, tau_src, *_ = case((2, 3))
    sigma_src, u = SCHEDULE.sigma(tau_src), torch.randn_like(x)
    values = torch.stack([u, u, u] if mode == "grid" else [u, 0 * u, 0 * u], 1)
    policy = DXPolicy(values, x, sigma_src, 1 / 3.5, 3.2, mode)
    for total in (4, 128):
        end = rollout(policy, x, tau_src, tau_src - 1 / 3.5, SCHEDULE, total)
        moved = column(SCHEDULE.sigma(tau_src - 1 / 3.5) - sigma_src, x)
        torch.testing.assert_close(end, x + moved * u)


def test_last_segments_grid_ends_at_zero_and_is_constant_outside() -> None:
    x, *_ = case((2, 3))
    last = segments(4, 0.5)[-1]
    sigma_src = SCHEDULE.sigma(torch.full((2,), last.tau_src, dtype=F64))
    values = torch.randn(2, 3, *x.shape[1:], dtype=F64)
    policy = DXPolicy(values, x, sigma_src, 1 / 3.5, 3.2)

    def grid_point(index: int) -> Tensor:
        return x - column(sigma_src, x) * values[:, index]

    zero, middle = torch.zeros(2, dtype=F64), torch.full((2,), last.tau_src / 2, dtype=F64)
    torch.testing.assert_close(policy.denoised(zero), grid_point(0))
    torch.testing.assert_close(policy.denoised(SCHEDULE.sigma(middle)), grid_point(1))
    torch.testing.assert_close(policy.denoised(torch.ones(2, dtype=F64)), grid_point(2))


@pytest.mark.parametrize("mode", get_args(Mode))
def test_gradients_by_finite_differences(mode: str) -> None:
    x, tau_src, *_ = case((1, 2))
    values = torch.randn(2, 3, *x.shape[1:], dtype=F64, requires_grad=True)
    sigma_src = SCHEDULE.sigma(tau_src)

    def end(v: Tensor) -> Tensor:
        policy = DXPolicy(v, x, sigma_src, 1 / 3.5, 3.2, mode)
        return rollout(policy, x, tau_src, tau_src - 0.2, SCHEDULE, 32)

    assert torch.autograd.gradcheck(end, (values,))
    policy = DXPolicy(values, x, sigma_src, 1 / 3.5, 3.2, mode)
    assert not policy.detach().velocity(x, sigma_src).requires_grad


def test_one_point_grid_is_constant_and_half_precision_becomes_float32() -> None:
    x, tau_src, *_ = case((2, 3))
    half, sigma = x.to(torch.bfloat16), SCHEDULE.sigma(tau_src)
    policy = DXPolicy(half.unsqueeze(1), half, sigma, 1.0, 3.2)
    assert policy.velocity(half, sigma).dtype == torch.float32
    torch.testing.assert_close(policy.denoised(sigma), policy.denoised(0.1 * sigma))


@pytest.mark.parametrize(
    ("values", "size", "mode", "message"),
    [
        (torch.zeros(2, 3, 3, 2, 3), 0.5, "spline", "grid or polynomial or velocity_pol"),
        (torch.zeros(2, 3, 3, 2, 3), 0.0, "grid", "segment_size in"),
        (torch.zeros(2, 0, 3, 2, 3), 0.5, "grid", "N_g >= 1"),
        (torch.zeros(2, 3, 2, 3), 0.5, "grid", "expected values"),
    ],
)
def test_bad_input_says_what_was_expected(values, size, mode, message) -> None:
    with pytest.raises(ValueError, match=message):
        DXPolicy(values, torch.zeros(2, 3, 2, 3), torch.ones(2), size, 3.2, mode)
