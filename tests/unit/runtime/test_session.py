"""A cluster's address is tried before Ray's client waits for it."""

from __future__ import annotations

import socket
import time

import pytest

from piflow.runtime.session import _require_cluster


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_nobody_listens_is_told_at_once(form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(f"127.0.0.1:{server.getsockname()[1]}")
        _require_cluster(address)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"RAY_ADDRESS={address}; expected the address"):
        _require_cluster(address)
    assert time.monotonic() - began < 11


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_an_address_that_names_no_place_is_left_to_ray(address: str) -> None:
    _require_cluster(address)
