"""torch.distributed's process group, whose meeting point listens on the cluster's address alone.

Left to itself, torch's TCPStore listens on every address of rank 0's machine, and serves whoever
comes without asking who it is.
"""

from __future__ import annotations

import importlib
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class ClusterTorchConfig(TorchConfig):
    """Ray Train's process group, met at the address that Ray knows rank 0's machine by."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the group up on the workers."""
        return _ClusterBackend


class _ClusterBackend(_TorchBackend):
    """Its calls run in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Before the workers meet."""
        worker_group.execute(listen_on_given_address)
        super().on_start(worker_group, backend_config)


def listen_on_given_address() -> None:
    """Have this process's meeting points listen where they are to be found, and nowhere else."""
    # torch.distributed has a function of the module's name, which `import` would find
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    module._create_c10d_store = _create_store


def _create_store(
    hostname: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: timedelta,
    use_libuv: bool = True,
) -> dist.TCPStore:
    """torch's function of this kind, with a socket of ours for rank 0."""
    descriptor = None
    if rank == 0:
        family, _, _, _, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(4096)
        descriptor = listening.detach()  # the store closes it
    return dist.TCPStore(
        host_name=hostname,
        port=port,
        world_size=world_size,
        is_master=rank == 0,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=descriptor,
        use_libuv=use_libuv,
    )
