"""A whole run whose two workers share each micro-batch's tokens is the run of one worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.faults.runs import SmallRun, cluster_environment, small_recipe

pytestmark = pytest.mark.timeout(600)


def test_two_workers_of_a_group_equal_one(folder: Path, address: str) -> None:
    """Prompts of every step, losses, and weights and averages of the last checkpoint."""
    runs = []
    for name, runtime in (
        ("together", {"context_parallel": 2}),
        ("one", {"num_workers": 1, "strategy": "single"}),
    ):
        recipe = small_recipe(
            folder,
            name,
            training={"steps": 6, "checkpoint_every": 6, "sample_every": 3},
            lora={"dropout": 0.0},
            runtime=runtime,
        )
        run = SmallRun(folder, recipe, cluster_environment(address))
        with run.running() as driver:
            run.finish(driver)
        runs.append(run)
    together, one = runs
    assert together.sequence() == one.sequence()
    losses = [[loss for _, loss in run.losses()] for run in runs]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    expected, got = one.weights(), together.weights()
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, atol=1e-5, rtol=1e-4, msg=key)
