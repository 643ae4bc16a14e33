"""The samplers: Euler on straight lines, flow-map steps, temperature, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from piflow.policies import DXPolicy, GMFlowPolicy, rollout
from piflow.sampling import check_nfe, flow_map_step, follow, sample_euler, sample_few_step
from piflow.schedule import FewStep, FlowSchedule

F64 = torch.float64
SCHEDULE = FlowSchedule(3.2)
TARGET = torch.randn(2, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))


def few_step(nfe: int, final_step_size_scale: float = 0.5, total_substeps: int = 128) -> FewStep:
    return FewStep(nfe, final_step_size_scale, SCHEDULE.shift, total_substeps)


def to_target(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of data that is TARGET and nothing else."""
    return (x - TARGET) / sigma[:, None, None, None]


def dx_student(x: Tensor, sigma: Tensor) -> DXPolicy:
    return DXPolicy(to_target(x, sigma.double()).unsqueeze(1), x, sigma, 1.0, 3.2)


def gm_student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
    """Two components at velocities 1 and 3 with weights 0.75 and 0.25."""
    means = torch.stack([torch.full_like(x, 1.0), torch.full_like(x, 3.0)], 1)
    logs = torch.tensor([0.75, 0.25], dtype=F64).log().reshape(1, 2, 1, 1, 1).expand(2, 2, 1, 2, 2)
    return GMFlowPolicy(means, torch.full((2, 1, 1, 1, 1), -3.0, dtype=F64), logs, x, sigma)


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_euler_is_exact_on_straight_lines(steps: int) -> None:
    torch.testing.assert_close(
        sample_euler(to_target, NOISE, SCHEDULE, steps), TARGET, rtol=1e-5, atol=1e-5
    )
    constant = sample_euler(lambda x, sigma: torch.ones_like(x), NOISE, SCHEDULE, steps)
    torch.testing.assert_close(constant, NOISE - 1)


def test_euler_steps_are_uniform_in_tau() -> None:
    seen = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return torch.zeros_like(x)

    sample_euler(velocity, NOISE, SCHEDULE, 4)
    expected = SCHEDULE.sigma(torch.tensor([1.0, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(torch.stack(seen), expected[:, None].expand(4, 2))


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_few_steps_call_the_student_at_segment_starts(nfe: int) -> None:
    seen = []

    def student(x: Tensor, sigma: Tensor) -> DXPolicy:
        seen.append(sigma)
        return dx_student(x, sigma)

    found = sample_few_step(student, NOISE, few_step(nfe))
    torch.testing.assert_close(found, TARGET, rtol=1e-5, atol=1e-5)
    starts = torch.tensor([SCHEDULE.sigma(part.tau_src) for part in few_step(nfe).segments])
    torch.testing.assert_close(torch.stack(seen)[:, 0], starts)


@pytest.mark.parametrize(("temperature", "effective"), [("auto", 0.2), (0.6, 0.6), (1.0, 1.0)])
def test_temperature_holds_at_all_steps_but_the_last(temperature, effective: float) -> None:
    x = NOISE
    for index, part in enumerate(few_step(3).segments):
        start, stop = (torch.full((2,), tau, dtype=F64) for tau in (part.tau_src, part.tau_dst))
        policy = gm_student(x, SCHEDULE.sigma(start))
        x = rollout(
            policy.temperature(effective) if index < 2 else policy, x, start, stop, SCHEDULE
        )
    found = sample_few_step(gm_student, NOISE, few_step(3), temperature=temperature)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_flow_map_limits() -> None:
    calm = flow_map_step(0.9, 0.5, 0.0)
    assert (calm.sigma_dst, calm.keep, calm.noise) == (0.5, 1.0, 0.0)
    wild = flow_map_step(0.9, 0.5, math.inf)
    assert (wild.sigma_dst, wild.keep, wild.noise) == (0.0, 0.5, 0.5)
    first = flow_map_step(1.0, 0.5, 0.3)
    assert (first.sigma_dst, first.keep, first.noise) == (0.0, 0.5, 0.5)
    last = flow_map_step(0.4, 0.0, 0.3)
    assert (last.sigma_dst, last.keep, last.noise) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("h", [0.2, 1.0, 3.0])
def test_flow_map_step_lands_on_the_right_marginal(h: float) -> None:
    """Signal and noise of keep * x_dst + noise * eps are alpha_to and sigma_to."""
    step = flow_map_step(0.9, 0.5, h)
    assert step.keep * (1 - step.sigma_dst) == pytest.approx(0.5)
    assert (step.keep * step.sigma_dst) ** 2 + step.noise**2 == pytest.approx(0.25)
    m = (0.5 * 0.1 / (0.9 * 0.5)) ** (h * h)
    assert step.sigma_dst == pytest.approx(0.5 * m / (0.5 + 0.5 * m))


def test_renoising_comes_from_the_generator_alone() -> None:
    policy, part = dx_student(NOISE, torch.ones(2)), few_step(2).segments[0]
    first, second, other = (
        follow(policy, NOISE, few_step(2), 0, h=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    sigma = SCHEDULE.sigma(part.tau_dst)
    noise = torch.randn(NOISE.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = (1 - sigma) * TARGET + sigma * noise
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)


def test_a_generator_a_sample() -> None:
    """A sample then depends on its own generator, not on its neighbours."""

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(rows: slice, *seeds: int) -> Tensor:
        def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
            means = torch.stack([0.5 * x, 2 * x], 1)
            logs = torch.zeros(len(x), 2, 1, 2, 2, dtype=F64)
            return GMFlowPolicy(means, logs[:, :1, :, :1, :1], logs, x, sigma)

        noise, randomness = NOISE[rows], generators(*seeds)
        return sample_few_step(student, noise, few_step(3), h=1.0, generator=randomness)

    both = sample(slice(0, 2), 3, 4)
    assert torch.equal(both[1:], sample(slice(1, 2), 4))
    assert not torch.equal(both, sample(slice(0, 2), 4, 3))
    with pytest.raises(ValueError, match="one for each of the 2 samples, got 3"):
        sample(slice(0, 2), 3, 4, 5)


def test_numbers_of_evaluations_that_a_student_takes() -> None:
    assert check_nfe(4, 4, elastic=True) == check_nfe(4, 4, elastic=False) == ""
    assert "runs at 16, whose steps start where it never did" in check_nfe(16, 4, elastic=True)
    assert "runs at 3, in longer steps" in check_nfe(3, 4, elastic=True)
    assert "runs at 5, whose steps start where it never did" in check_nfe(5, 4, elastic=False)
    with pytest.raises(ValueError, match="runs at 4 or more, since its policy .DX.*, got 3"):
        check_nfe(3, 4, elastic=False)


CENTRES, SPREAD = torch.tensor([-1.0, 2.0], dtype=F64), 0.3


def exact_student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
    """Data are two Gaussians a pixel, equally likely; the policy is their exact posterior."""
    level = sigma.double().reshape(-1, 1, 1, 1, 1)
    centres, variance = CENTRES.reshape(1, 2, 1, 1, 1), SPREAD**2
    total = ((1 - level) * SPREAD).square() + level.square()
    residual = x.unsqueeze(1) - (1 - level) * centres
    logs = (-0.5 * residual.square() / total).sum(2, keepdim=True)
    means = centres + (1 - level) * variance / total * residual
    logstd = 0.5 * (variance / total).log()
    return GMFlowPolicy((x.unsqueeze(1) - means) / level, logstd, logs, x, sigma)


@pytest.mark.parametrize("nfe", [2, 4, 9])
def test_elastic_nfe_of_a_student_that_knows_the_data(nfe: int) -> None:
    """It rolls out to one end at any number of evaluations."""
    noise = NOISE[:, :1]
    once, found = (
        sample_few_step(exact_student, noise, few_step(count, total_substeps=2048), temperature=1.0)
        for count in (1, nfe)
    )
    torch.testing.assert_close(found, once, rtol=0, atol=2e-3)
    assert (once - noise).abs().max() > 0.5


@pytest.mark.parametrize("h", [0.0, 0.5, math.inf])
def test_renoising_keeps_the_datas_distribution(h: float) -> None:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(8, 1, 40, 40, dtype=F64, generator=generator)
    found = sample_few_step(
        exact_student, noise, few_step(4, total_substeps=512),
        temperature=1.0, h=h, generator=generator,
    )  # fmt: skip
    right = found > 0.5
    assert right.double().mean() == pytest.approx(0.5, abs=0.02)  # std of the share: 0.0044
    for side, centre in ((found[~right], -1.0), (found[right], 2.0)):
        assert side.mean() == pytest.approx(centre, abs=0.03)
        assert side.std() == pytest.approx(SPREAD, abs=0.02)


def test_half_precision_noise_is_sampled_in_float32() -> None:
    assert sample_euler(lambda x, s: x, NOISE.bfloat16(), SCHEDULE, 2).dtype == torch.float32


def test_bad_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="steps >= 1"):
        sample_euler(to_target, NOISE, SCHEDULE, 0)
    with pytest.raises(ValueError, match="GMFlowPolicy for temperature"):
        sample_few_step(dx_student, NOISE, few_step(2), temperature=0.5)
    with pytest.raises(ValueError, match="h >= 0"):
        flow_map_step(0.9, 0.5, -1.0)
    with pytest.raises(ValueError, match="sigma_src > sigma_to"):
        flow_map_step(0.5, 0.9, 1.0)
