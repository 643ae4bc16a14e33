"""Whether this process's machine is about to be taken away, by Ray's insides."""

from __future__ import annotations

import ray
from ray._private.state import state


def is_draining() -> bool:
    """Somebody has told Ray so: `ray drain-node`, or SIGTERM to `ray start --block`."""
    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
