"""The diffusers scheduler: same numbers as the sampler, save and load, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from torch import Tensor

from piflow.policies import DXPolicy, GMFlowPolicy
from piflow.sampling import Student, sample_few_step
from piflow.schedule import FewStep, FlowSchedule, segments
from piflow.scheduler import FlowMapScheduler

OUTPUT = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))


def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
    logs = torch.full((2, 1, 1, 1, 1), -2.0), torch.zeros(2, 3, 1, 2, 2)
    return GMFlowPolicy(OUTPUT + x[:, None] * sigma[:, None, None, None, None], *logs, x, sigma)


def dx_student(mode: Any) -> Student:
    """A DX student of four evaluations, f = 0.5."""

    def policy(x: Tensor, sigma: Tensor) -> DXPolicy:
        return DXPolicy(OUTPUT + x[:, None], x, sigma, 1 / 3.5, 3.2, mode)

    return policy


def run(scheduler: FlowMapScheduler, nfe: int, student: Student = student) -> Tensor:
    scheduler.set_timesteps(nfe)
    x, generator = NOISE, torch.Generator().manual_seed(2)
    for timestep in scheduler.timesteps:
        policy = student(x, (timestep / 1000).expand(2))
        x = scheduler.step(policy, timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("h", [0.0, 0.7, math.inf])
@pytest.mark.parametrize("nfe", [1, 4, 7])
def test_equals_the_sampler(h: float, nfe: int) -> None:
    found = run(FlowMapScheduler(h="inf" if math.isinf(h) else h), nfe)
    few_step, generator = FewStep(nfe, 0.5, 3.2, 128), torch.Generator().manual_seed(2)
    expected = sample_few_step(student, NOISE, few_step, h=h, generator=generator)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h", [0.0, 0.7, math.inf])
@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_equals_the_sampler_for_dx(mode: str, h: float) -> None:
    dx, generator = dx_student(mode), torch.Generator().manual_seed(2)
    found = run(FlowMapScheduler(h="inf" if math.isinf(h) else h), 4, dx)
    few_step = FewStep(4, 0.5, 3.2, 128)
    expected = sample_few_step(dx, NOISE, few_step, h=h, generator=generator)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="GMFlowPolicy for temperature"):
        run(FlowMapScheduler(temperature=0.5), 4, dx)


class Packed:
    """A loop that carries (B, HW, C) and a student whose tokens are GM means alone."""

    def latents(self, sample: Tensor) -> Tensor:
        return sample.transpose(1, 2).unflatten(2, (2, 2))

    def sample(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def policy(self, tokens: Tensor, latents: Tensor, sigma: Tensor) -> GMFlowPolicy:
        logs = torch.full((2, 1, 1, 1, 1), -2.0), torch.zeros(2, 3, 1, 2, 2)
        return GMFlowPolicy(tokens, *logs, latents, sigma)


def means(x: Tensor, timestep: Tensor) -> Tensor:
    return OUTPUT + x[:, None] * timestep / 1000


@pytest.mark.parametrize("h", [0.0, 0.7])
def test_tokens_are_read_as_policies(h: float) -> None:
    """In another layout and without a generator at `step`, as diffusers' loops call it."""
    scheduler, reader = FlowMapScheduler(h=h), Packed()
    expected = run(scheduler, 3)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3], mu=0.7)
    scheduler.set_begin_index(0)
    x = reader.sample(NOISE)
    with scheduler.reading(reader, torch.Generator().manual_seed(2)):
        for timestep in scheduler.timesteps:
            tokens = means(reader.latents(x), timestep)
            (x,) = scheduler.step(tokens, timestep, x, return_dict=False)
    torch.testing.assert_close(reader.latents(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="all 3 steps were taken"):
        scheduler.step(student(NOISE, torch.ones(2)), 1000.0, NOISE)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="expected a policy, got a tensor"):
        scheduler.step(tokens, 1000.0, x)


def test_half_precision_samples_stay_in_their_dtype() -> None:
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(2)
    noise = NOISE.bfloat16()
    found = scheduler.step(student(noise.float(), torch.ones(2)), 1000.0, noise).prev_sample
    exact = scheduler.step(student(noise.float(), torch.ones(2)), 1000.0, noise.float()).prev_sample
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


def test_sigmas_of_a_pipeline_only_count() -> None:
    """diffusers passes its own spacing and its own shift, which belong to the teacher."""
    scheduler, plain = FlowMapScheduler(), FlowMapScheduler()
    plain.set_timesteps(4)
    timesteps, nfe = retrieve_timesteps(scheduler, 4, "cpu", sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9)
    assert nfe == 4 and torch.equal(timesteps, plain.timesteps)


def test_save_and_load_keep_every_setting(tmp_path: Path) -> None:
    scheduler = FlowMapScheduler(
        shift=2.0, final_step_size_scale=0.25, total_substeps=64, temperature=0.5, h="inf"
    )
    scheduler.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").is_file()
    loaded = FlowMapScheduler.from_pretrained(tmp_path)
    saved = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    assert {key: loaded.config[key] for key in saved} == saved
    assert (loaded.config.shift, loaded.config.h, loaded.config.temperature) == (2.0, "inf", 0.5)
    assert torch.equal(run(loaded, 3), run(scheduler, 3))


def test_timesteps_are_segment_starts() -> None:
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(4)
    starts = [1000 * FlowSchedule(3.2).sigma(part.tau_src) for part in segments(4, 0.5)]
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(starts))
    assert scheduler.sigmas[-1] == 0 and scheduler.init_noise_sigma == 1.0


def test_dynamic_shift_follows_the_sequence_length() -> None:
    scheduler = FlowMapScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(4, sequence_length=4096)
    assert scheduler.few_step.shift == pytest.approx(math.exp(1.15))
    scheduler.set_timesteps(4, mu=0.7)
    assert scheduler.few_step.shift == pytest.approx(math.exp(0.7))
    with pytest.raises(ValueError, match="sequence_length"):
        scheduler.set_timesteps(4)


def test_scale_noise_is_the_interpolation() -> None:
    found = FlowMapScheduler().scale_noise(NOISE, torch.tensor([250.0, 1000.0]), OUTPUT[:, 0])
    torch.testing.assert_close(found[0], 0.75 * NOISE[0] + 0.25 * OUTPUT[0, 0])
    torch.testing.assert_close(found[1], OUTPUT[1, 0])


def test_bad_input_says_what_was_expected() -> None:
    scheduler = FlowMapScheduler()
    policy = student(NOISE, torch.ones(2))
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(policy, 1000.0, NOISE)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="one of the timesteps"):
        scheduler.step(policy, 990.0, NOISE)
    with pytest.raises(ValueError, match="needs num_inference_steps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="3 steps but 1 sigmas"):
        scheduler.set_timesteps(3, sigmas=[1.0])
    with pytest.raises(ValueError, match="h >= 0"):
        FlowMapScheduler(h=-1.0)
    with pytest.raises(ValueError, match="temperature >= 0"):
        FlowMapScheduler(temperature=-0.5)
    with pytest.raises(ValueError, match=r"final_step_size_scale in \(0, 1\], got 2"):
        FlowMapScheduler(final_step_size_scale=2.0)
