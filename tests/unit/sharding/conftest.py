"""A tiny FLUX folder for training on one and several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.sharding.training import save_model


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "inductor: compiles C++; only with -m inductor")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "inductor" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("inductor")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    save_model(folder)
    return folder
