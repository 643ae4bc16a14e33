"""Three workers with four micro-batches a step train what one worker trains."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.sharding.single import SingleStrategy

SCRIPT = Path(__file__).parent / "uneven_workers.py"
sys.path.insert(0, str(SCRIPT.parent))
_spec = importlib.util.spec_from_file_location("uneven_workers", SCRIPT)
assert _spec is not None and _spec.loader is not None
UNEVEN = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(UNEVEN)
sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Any]]:
    module, before = UNEVEN.resharded, UNEVEN.resharded.MICRO_BATCHES
    yield UNEVEN.trained(SingleStrategy(torch.device("cpu")))
    module.MICRO_BATCHES = before


@pytest.fixture(scope="module")
def three(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("uneven")
    run_ranks(SCRIPT, folder, world_size=3)
    results: dict[str, dict[str, Any]] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.mark.parametrize("name", UNEVEN.STRATEGIES)
def test_three_workers_with_four_micro_batches_equal_one(
    name: str, alone: dict[str, Any], three: dict[str, dict[str, Any]]
) -> None:
    """Only the order of summation differs; one micro-batch more or less would be a third."""
    assert three[name]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert three[name]["state"].keys() == alone["state"].keys()
    for key, expected in alone["state"].items():
        gap = (three[name]["state"][key].float() - expected.float()).norm()
        assert gap <= 1e-4 * expected.float().norm(), key
