"""The diffusers scheduler: same numbers as the sampler, save and load, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from piflow.policies import GMFlowPolicy
from piflow.sampling import sample_few_step
from piflow.schedule import FlowSchedule, segments
from piflow.scheduler import FlowMapScheduler

OUTPUT = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))


def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
    logs = torch.full((2, 1, 1, 1, 1), -2.0), torch.zeros(2, 3, 1, 2, 2)
    return GMFlowPolicy(OUTPUT + x[:, None] * sigma[:, None, None, None, None], *logs, x, sigma)


def run(scheduler: FlowMapScheduler, nfe: int) -> Tensor:
    scheduler.set_timesteps(nfe)
    x, generator = NOISE, torch.Generator().manual_seed(2)
    for timestep in scheduler.timesteps:
        policy = student(x, (timestep / 1000).expand(2))
        x = scheduler.step(policy, timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("h", [0.0, 0.7, math.inf])
@pytest.mark.parametrize("nfe", [1, 4])
def test_equals_the_sampler(h: float, nfe: int) -> None:
    found = run(FlowMapScheduler(h="inf" if math.isinf(h) else h), nfe)
    parts, generator = segments(nfe, 0.5), torch.Generator().manual_seed(2)
    expected = sample_few_step(student, NOISE, FlowSchedule(3.2), parts, h=h, generator=generator)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    assert scheduler.schedule.shift == pytest.approx(math.exp(1.15))
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
    with pytest.raises(ValueError, match="h >= 0"):
        FlowMapScheduler(h=-1.0)
