"""Which network NCCL uses between machines, by its own log: a fallback to TCP says nothing else.

NCCL tells at its start which network it chose ("Using network Socket"), and for each channel what
it goes over ("via NET/Socket/0", "via P2P/CUMEM"). On AWS the plug-in for libfabric tells its
provider ("Selected provider is efa"), which may be TCP as well.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from piflow.storage.foreign import shown
from piflow.storage.scratch import claim

_CHOSEN = re.compile(r"NCCL INFO Using network ([^\r\n]+)")
_CHANNEL = re.compile(r"NCCL INFO Channel .* via ([^\r\n]+)")
_PROVIDER = re.compile(r"NET/OFI Selected provider is ([\w.;-]+)", re.IGNORECASE)
_TCP_PROVIDERS = ("tcp", "sockets", "udp", "net", "ofi_rxm;tcp", "tcp;ofi_rxm")
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class NcclNetwork:
    """What one worker's log tells.

    Attributes:
        chosen: network for other machines, such as ``Socket``, ``IB`` or ``AWS Libfabric``;
            empty: the log doesn't say.
        channels: what the channels go over, such as ``P2P``, ``NET/IB`` or ``NET/IB/GDRDMA``, the
            last one if the network card reads GPU memory itself.
        provider: libfabric's, such as ``efa``; empty: its plug-in isn't used.
        asked: the environment's NCCL_NET, which leaves NCCL no choice; empty: it isn't set.
    """

    chosen: str
    channels: tuple[str, ...]
    provider: str
    asked: str = ""

    @property
    def is_rdma(self) -> bool:
        """Whether the log says of a network that it isn't TCP."""
        networks = {part.split("/")[1] for part in self.channels if part.startswith("NET/")}
        if self.chosen:
            networks.add(self.chosen)
        return (
            bool(networks)
            and "Socket" not in networks
            and self.provider.lower() not in _TCP_PROVIDERS
        )

    def __str__(self) -> str:
        text = self.chosen or "unknown"
        if self.provider:
            text += f" (provider {self.provider})"
        if self.asked:
            text += f" (NCCL_NET={shown(self.asked, 40)} is set)"
        return f"{text}; channels {', '.join(self.channels)}" if self.channels else text


def keep_nccl_log() -> Path:
    """Have this process's NCCL, which must not have started yet, write its log to a new file."""
    folder, _ = claim("nccl")  # as long as this process lives
    file = folder / "log"
    os.environ.update(
        NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,P2P,SHM", NCCL_DEBUG_FILE=str(file)
    )
    return file


def read_nccl_log(file: Path) -> NcclNetwork:
    """What the log tells so far; the beginning of a very long one."""
    log = b""
    if file.is_file():
        with file.open("rb") as stream:
            log = stream.read(_MOST_BYTES)
    network = network_of(log.decode(errors="replace"))
    return replace(network, asked=os.environ.get("NCCL_NET", ""))


def network_of(log: str) -> NcclNetwork:
    """What a log tells; of several choices the last one counts."""
    chosen, provider = _CHOSEN.findall(log), _PROVIDER.findall(log)
    channels = {_kind(via) for via in _CHANNEL.findall(log)}
    return NcclNetwork(
        chosen[-1].strip() if chosen else "",
        tuple(sorted(channels)),
        provider[-1] if provider else "",
    )


def _kind(via: str) -> str:
    """``NET/AWS Libfabric/0/GDRDMA`` -> ``NET/AWS Libfabric/GDRDMA``; ``P2P/CUMEM`` -> ``P2P``."""
    parts = via.strip().split("/")
    if parts[0] != "NET" or len(parts) < 2:
        return parts[0]
    return "/".join(["NET", parts[1], *(part for part in parts[2:] if part == "GDRDMA")])
