"""What is told of a cluster that can't be used: its address, its token."""

from __future__ import annotations

import socket
import time

import pytest
from ray.exceptions import AuthenticationError

from piflow.runtime.exits import ExitCode, exit_code
from piflow.runtime.session import _require_cluster, _token_explained


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


def _as_ray_tells_of_a_token() -> ConnectionError:
    """Ray's client tries for half a minute, and then says nothing but that it can't connect."""
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    error.__cause__ = RuntimeError(
        "Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n"
        "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"
    )
    return error


@pytest.mark.parametrize("error", [_as_ray_tells_of_a_token(), AuthenticationError("no token")])
def test_a_refused_token_is_a_mistake_and_told_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(PermissionError) as refused, _token_explained():
        raise error
    assert exit_code(refused.value) is ExitCode.MISTAKE
    told = str(refused.value)
    assert told.startswith("the cluster at RAY_ADDRESS=10.0.0.1:6379 didn't take this process's")
    assert "RAY_AUTH_TOKEN" in told and told.endswith("which is disabled") and "\n" not in told


def test_a_cluster_that_is_away_may_come_back() -> None:
    with pytest.raises(ConnectionError, match="away") as lost, _token_explained():
        raise ConnectionError("away")
    assert exit_code(lost.value) is ExitCode.TRY_AGAIN
