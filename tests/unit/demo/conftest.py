"""The emoji are drawn once for all tests of the demo's data."""

from __future__ import annotations

import pytest
from torch import Tensor

from piflow.demo import emoji


@pytest.fixture(scope="session")
def drawable() -> tuple[list[emoji.Emoji], Tensor]:
    if not emoji.DEFAULT_FONT.exists():
        pytest.skip("needs Debian's fonts-noto-color-emoji")
    return emoji.list_drawable()
