"""Rollouts: straight lines, composition, per-sample substeps, gradients, memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from piflow.policies import GMFlowPolicy, Policy, mean_velocity, rollout
from piflow.policies.base import expand_as_latents
from piflow.policies.reference import posterior_mean
from piflow.schedule import FlowSchedule, segments

F64 = torch.float64
SCHEDULE = FlowSchedule(3.2)


@dataclass
class Plain:
    """A policy that hides its type, so that rollouts take the general path."""

    inner: Policy

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.inner.velocity(x, sigma)

    def detach(self) -> Plain:
        return Plain(self.inner.detach())


@dataclass
class Reference:
    """A policy by the plain posterior mean of network outputs; for rollouts as for `velocity`."""

    means: Tensor
    logstds: Tensor
    logweights: Tensor
    x_src: Tensor
    sigma_src: Tensor

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = self.sigma_src[:, None, None, None]
        x_src = self.x_src.flatten(2)
        mean = posterior_mean(
            x_src[:, None] - level * self.means.flatten(3),
            self.logweights.squeeze(2).flatten(2),
            (2 * self.logstds).exp().flatten() * self.sigma_src**2,
            x_src,
            self.sigma_src,
            x.flatten(2),
            sigma,
        )
        return (x - mean.reshape(x.shape)) / expand_as_latents(sigma, x)

    def detach(self) -> Reference:
        return self


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def make_policy(
    tau_src: Tensor,
    components: int = 3,
    channels: int = 4,
    space: tuple[int, ...] = (2, 3),
    shift: float = 3.2,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[GMFlowPolicy, Tensor, list[Tensor]]:
    """A policy at tau_src, its x_src and the network outputs that it was made from."""
    generator, batch = torch.Generator().manual_seed(seed), len(tau_src)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=F64, generator=generator).requires_grad_(requires_grad)

    leaves = [
        normal(batch, components, channels, *space),
        normal(batch, *[1] * (len(space) + 2)),
        normal(batch, components, 1, *space),
    ]
    x = normal(batch, channels, *space).detach()
    sigma_src = FlowSchedule(shift).sigma(tau_src)
    return GMFlowPolicy(*leaves, x, sigma_src), x, leaves


def column(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("total", [1, 4, 7, 128])
@pytest.mark.parametrize("logstd", [-60.0, -1.0])
def test_one_component_goes_straight_in_any_number_of_substeps(total: int, logstd: float) -> None:
    """Zero variance: exactly. Otherwise the first step is (the field bends later)."""
    u, x = torch.randn(2, 2, 4, 2, 3, dtype=F64).unbind(0)
    tau, end = times(1.0, 0.7), times(0.6, 0.0)
    sigma = SCHEDULE.sigma(tau)
    zeros = torch.zeros(2, 1, 1, 2, 3, dtype=F64)
    policy = GMFlowPolicy(
        u[:, None], torch.full((2, 1, 1, 1, 1), logstd, dtype=F64), zeros, x, sigma
    )
    straight = x + u * column(SCHEDULE.sigma(end) - sigma)
    found = rollout(policy, x, tau, end, SCHEDULE, total)
    if logstd < -50 or total == 1:
        torch.testing.assert_close(found, straight, rtol=1e-10, atol=1e-10)
    elif total == 128:
        assert (found - straight).abs().max() > 1e-3


@pytest.mark.parametrize("components", [3, 9])
def test_composition(components: int) -> None:
    """a -> b -> c equals a -> c where the substeps align."""
    tau_a, tau_b, tau_c = times(1.0, 0.75), times(0.75, 0.5), times(0.25, 0.0)
    policy, x, _ = make_policy(tau_a, components)
    at_b = rollout(policy, x, tau_a, tau_b, SCHEDULE, 64)
    twice = rollout(policy, at_b, tau_b, tau_c, SCHEDULE, 64)
    once = rollout(policy, x, tau_a, tau_c, SCHEDULE, 64)
    torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    nfe=st.integers(1, 8),
    scale=st.sampled_from([0.25, 0.5, 1.0]),
    components=st.integers(1, 10),
    channels=st.integers(1, 6),
    space=st.sampled_from([(1, 1), (2, 3), (2, 2, 2)]),
    shift=st.floats(0.5, 6),
    seed=st.integers(0, 1000),
)
def test_segment_by_segment_is_one_rollout(
    nfe, scale, components, channels, space, shift, seed
) -> None:
    """Where the substeps align with the segments of any NFE: 4 each, 4 scale the last."""
    schedule, one = FlowSchedule(shift), times(1.0)
    total = round(4 * (nfe - 1 + scale))
    policy, x, _ = make_policy(one, components, channels, space, shift, seed)
    once, y = rollout(policy, x, one, 0 * one, schedule, total), x
    for part in segments(nfe, scale):
        y = rollout(policy, y, times(part.tau_src), times(part.tau_dst), schedule, total)
    torch.testing.assert_close(y, once, rtol=1e-7, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    components=st.integers(1, 10),
    channels=st.integers(1, 6),
    space=st.sampled_from([(1, 1), (2, 3), (2, 2, 2)]),
    shift=st.floats(0.5, 6),
    starts=st.lists(st.floats(0.3, 1.0), min_size=1, max_size=3),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_every_form_of_a_rollout_is_the_references_euler_loop(
    components, channels, space, shift, starts, fraction, seed
) -> None:
    """Per sample, by the plain posterior mean alone; covers the Gram form (K < 2 C, long rollouts,
    no gradient), the attention form without gradient and with one, and the general policy's."""
    schedule, tau = FlowSchedule(shift), times(*starts)
    policy, x, leaves = make_policy(tau, components, channels, space, shift, seed)
    plain = Reference(*leaves, x, schedule.sigma(tau))
    stop = tau * fraction
    expected = []
    for row in range(len(tau)):
        counts = max(1, int(((tau[row] - stop[row]) * 40).round()))
        y = x.clone()
        path = torch.linspace(0, 1, counts + 1, dtype=F64) * (stop[row] - tau[row]) + tau[row]
        sigmas = schedule.sigma(path)
        for now, later in zip(sigmas[:-1], sigmas[1:], strict=True):
            y = y + (later - now) * plain.velocity(y, now.expand(len(tau)))
        expected.append(y[row])
    reference = torch.stack(expected)
    trained, _, _ = make_policy(tau, components, channels, space, shift, seed, requires_grad=True)
    for form in (policy, trained, Plain(policy), plain):
        found = rollout(form, x, tau, stop, schedule, 40).detach()
        torch.testing.assert_close(found, reference, rtol=1e-7, atol=1e-7)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    tau, stop = times(1.0, 0.9, 0.5), times(0.9, 0.1, 0.5)
    policy, x, leaves = make_policy(tau)
    together = rollout(policy, x, tau, stop, SCHEDULE)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = GMFlowPolicy(*[leaf[rows] for leaf in leaves], x[rows], SCHEDULE.sigma(tau[rows]))
        found = rollout(alone, x[rows], tau[rows], stop[rows], SCHEDULE)
        torch.testing.assert_close(found, together[rows], rtol=1e-9, atol=1e-9)
    assert torch.equal(together[2], x[2])


def test_float32_is_close_to_float64_down_to_zero() -> None:
    tau, stop = times(1.5 / 3.5, 0.5 / 3.5), times(0.0, 0.0)
    _, x, leaves = make_policy(tau, 8, 12, (4, 4))
    means = torch.randn(2, 1, 12, 4, 4, dtype=F64) + 0.2 * leaves[0]
    arguments = [means, leaves[1] - 2, leaves[2], x, SCHEDULE.sigma(tau)]
    exact = rollout(GMFlowPolicy(*arguments), x, tau, stop, SCHEDULE)
    single = GMFlowPolicy(*[argument.float() for argument in arguments])
    for form in (single, Plain(single)):
        found = rollout(form, x.float(), tau, stop, SCHEDULE)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("substeps", [3, 12])
def test_gradients_by_finite_differences(substeps: int) -> None:
    """The backward pass is written by hand; 12 substeps of one sample meet one of the other."""
    tau = times(0.9, 0.6)
    _, x, leaves = make_policy(tau, 2, 2, (1, 2), requires_grad=True)
    stop = tau - times(substeps / 40, 1 / 40)

    def end(means, logstds, logweights, start) -> Tensor:
        policy = GMFlowPolicy(means, logstds, logweights, x, SCHEDULE.sigma(tau))
        return rollout(policy, start, tau, stop, SCHEDULE, 40)

    assert torch.autograd.gradcheck(end, (*leaves, x.clone().requires_grad_()))

    def mean(means, logstds, logweights) -> Tensor:
        policy = GMFlowPolicy(means, logstds, logweights, x, SCHEDULE.sigma(tau))
        return mean_velocity(policy, x, tau, stop, SCHEDULE, 40)

    assert torch.autograd.gradcheck(mean, tuple(leaves))


def test_rollout_to_zero_has_finite_gradient_when_some_samples_stop_early() -> None:
    tau, stop = times(0.2, 0.02, 0.0), times(0.0, 0.0, 0.0)
    for components in (3, 9):
        policy, x, leaves = make_policy(times(1.0, 1.0, 1.0), components, requires_grad=True)
        end = rollout(policy, x, tau, stop, SCHEDULE)
        assert torch.isfinite(end).all() and torch.equal(end[2], x[2])
        end.square().sum().backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_mean_velocity_is_the_rollouts_secant_or_the_instantaneous_velocity() -> None:
    tau, stop = times(0.9, 0.8, 0.7), times(0.5, 0.8, 0.7 - 1.2 / 128)
    policy, x, _ = make_policy(tau)
    found = mean_velocity(policy, x, tau, stop, SCHEDULE)
    span = SCHEDULE.sigma(tau) - SCHEDULE.sigma(stop)
    secant = (x - rollout(policy, x, tau, stop, SCHEDULE)) / column(span)
    torch.testing.assert_close(found[0], secant[0])
    instantaneous = policy.velocity(x, SCHEDULE.sigma(tau))
    torch.testing.assert_close(found[1:], instantaneous[1:])
    torch.testing.assert_close(mean_velocity(policy, x, tau, tau, SCHEDULE), instantaneous)


@pytest.mark.parametrize("components", [4, 12])
def test_gradient_stores_state_and_weights_of_a_substep(components: int) -> None:
    """C + K numbers a pixel and substep, where autograd would keep several times K C; none without
    gradient, in the Gram form (4) or the attention form (12)."""
    channels, pixels, tau = 4, 64 * 64, torch.ones(1)

    def stored_bytes(substeps: int, requires_grad: bool) -> int:
        leaf = torch.randn(1, components, channels, 64, 64, requires_grad=requires_grad)
        logs = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, components, 1, 64, 64)
        policy = GMFlowPolicy(leaf, *logs, torch.randn(1, channels, 64, 64), torch.ones(1))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
            end = rollout(
                policy, torch.zeros(policy.latent_shape), tau, tau - substeps / 128, SCHEDULE
            )
        assert end.requires_grad == requires_grad
        return sum(event.self_cpu_memory_usage for event in recording.key_averages())

    for requires_grad in (True, False):
        growth = (stored_bytes(20, requires_grad) - stored_bytes(10, requires_grad)) / 10
        expected = 4 * pixels * (components + channels) * requires_grad
        assert growth == pytest.approx(expected, abs=0.02 * 4 * pixels)


def test_bad_times_say_what_was_expected() -> None:
    policy, x, _ = make_policy(times(1.0, 1.0))
    with pytest.raises(ValueError, match="from noise to data"):
        rollout(policy, x, times(0.5, 0.5), times(0.6, 0.4), SCHEDULE)
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        rollout(policy, x, torch.tensor(0.5), torch.tensor(0.4), SCHEDULE)
    with pytest.raises(ValueError, match="from noise to data"):
        rollout(policy, x, times(1.5, 0.5), times(0.6, 0.4), SCHEDULE)
