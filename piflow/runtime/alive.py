"""Whether Ray itself is alive, as the driver sees it."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import ray

from piflow.runtime.exits import RayLostError
from piflow.runtime.ray_private import ended_processes

_LOOK_SECONDS = 2.0  # without an answer, until Ray is looked at
_KNOCK_SECONDS = 5.0  # between looks at a cluster's head
_SPARE_SECONDS = 15.0  # for the driver's own end, before Ray's client ends the process


class RayWatch:
    """Finds out that Ray is gone before its client does, which ends the process without a word.

    On an instance of this machine's own a look at the processes tells. A cluster's head may come
    back (it can be made fault-tolerant), so it is given most of the time that Ray's client gives
    it: `RAY_gcs_rpc_server_reconnect_timeout_s`, 60 s.
    """

    def __init__(self) -> None:
        self._address = ray.get_runtime_context().gcs_address
        patience = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))
        self._patience = max(patience - _SPARE_SECONDS, patience / 2)
        self._answered = self._knocked = time.monotonic()

    def require(self) -> None:
        """Go on only if Ray lives, as far as can be told without waiting.

        Raises:
            RayLostError: it doesn't.
        """
        ended = ended_processes()
        if ended:
            raise RayLostError(
                f"Ray's {' and '.join(ended)} on this machine ended, and with it the workers; "
                "the newest checkpoint is good"
            )
        if time.monotonic() - self._knocked < _KNOCK_SECONDS:
            return
        self._knocked = time.monotonic()
        if is_listening(self._address, _LOOK_SECONDS):
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > self._patience:
            raise RayLostError(
                f"the Ray cluster's head at {self._address} didn't answer for "
                f"{self._patience:.0f} s; the newest checkpoint is good"
            )

    def answer(self, reference: Any) -> Any:
        """What an actor answers, while Ray lives.

        Raises:
            RayLostError: Ray is gone, or the actor for good.
        """
        while True:
            try:
                return ray.get(reference, timeout=_LOOK_SECONDS)
            except ray.exceptions.GetTimeoutError:
                self.require()
            except ray.exceptions.RayActorError as error:
                self.require()
                reason = next(iter(str(error).splitlines()), "")
                raise RayLostError(
                    f"Ray lost an actor of the driver's machine ({reason}); the newest "
                    "checkpoint is good"
                ) from error


def is_listening(address: str, seconds: float) -> bool:
    """Whether somebody takes a TCP connection at `host:port` within so many seconds."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError:
        return False
    return True
