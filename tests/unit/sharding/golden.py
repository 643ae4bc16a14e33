"""Losses and gradient norms of one plain process, kept in tests/golden: this makes them.

Run it after a change that is meant to change results, and say in the commit why they changed:

    OMP_NUM_THREADS=1 python -m tests.unit.sharding.golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.unit.sharding import training

GOLDEN = Path(__file__).parents[2] / "golden"


def path_of(scenario: str) -> Path:
    """The scenario's file."""
    return GOLDEN / f"{scenario.lower().replace(', ', '-').replace(' ', '-')}.json"


def record(scenario: str, result: training.Result) -> dict[str, Any]:
    """What a file holds: config, losses by step and micro-batch, gradient norms by step."""
    steps = [
        [result.losses[step, index] for index in range(training.MICRO_BATCHES)]
        for step in range(training.STEPS)
    ]
    return {
        "config": {
            "scenario": scenario,
            "recipe": training.SCENARIOS[scenario],
            "model": training.TINY_FLUX,
            "latents": [training.HEIGHT, training.WIDTH],
        },
        "losses": steps,
        "grad_norms": result.norms,
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        training.save_model(Path(name))
        for scenario in training.SCENARIOS:
            result = training.train(training.Run(scenario, "single"), Path(name))
            content = json.dumps(record(scenario, result), indent=1)
            path_of(scenario).write_text(content + "\n")
            print(path_of(scenario))


if __name__ == "__main__":
    main()
