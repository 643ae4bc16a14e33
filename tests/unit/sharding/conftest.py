"""A tiny FLUX folder for training on one and several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.sharding.training import save_model

ON_REQUEST = {
    "inductor": "compiles C++; only with -m inductor",
    "slow_runs": "trainings that take minutes; only with -m slow_runs",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in ON_REQUEST.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = [name for name in ON_REQUEST if name not in config.option.markexpr]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in names)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    save_model(folder)
    return folder
