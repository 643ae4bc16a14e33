"""What `piflow.backbones.Backbone` promises, of our adapters and the documentation's example.

pytest tests/conformance --backbone my.module:function
"""

from __future__ import annotations

import pytest

from piflow.testing.conformance import CHECKS, Check, Make


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_it_holds(make: Make, check: Check) -> None:
    check(make)
