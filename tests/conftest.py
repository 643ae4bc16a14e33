from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backbone",
        metavar="MODULE:FUNCTION",
        help="run tests/conformance on this adapter alone; FUNCTION() returns a fresh tiny "
        "backbone, a conditioning of three prompts and the latents' (height, width)",
    )
