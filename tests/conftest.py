from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

SPREAD = ("tests/integration/test_smoke.py",)  # long, and its tests share nothing but a cluster


class Scheduling(LoadFileScheduling):
    """A file's tests run in one process, since they share what is slow to set up; but SPREAD's."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return nodeid if file in SPREAD else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backbone",
        metavar="MODULE:FUNCTION",
        help="run tests/conformance on this adapter alone; FUNCTION() returns a fresh tiny "
        "backbone, a conditioning of three prompts and the latents' (height, width)",
    )
